"""What a model does beside and between its layers, and what its layers do to what they are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.errors import SourceError
from tests.exports import exported

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def change(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return made

    def forward(self, x: Tensor) -> Any:
        return x + self.change(x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.change(x)
        return x


@dataclass
class Made:
    hidden: Tensor
    extra: str = ""


class Object(Block):
    def forward(self, x: Tensor) -> Made:
        return Made(x + self.change(x))


class Opaque(Block):
    def forward(self, x: Tensor) -> Callable[[], Tensor]:
        made = x + self.change(x)
        return lambda: made


def nothing(x: Tensor, _: Tensor) -> Tensor:
    return x


class Model(nn.Module):
    """Four blocks, and something between the second and the third."""

    def __init__(
        self, block: type[Block] = Block, between: Callable[[Tensor, Tensor], Tensor] = nothing
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 5)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        first, given = x * 1.0, x * 1.0
        for index, layer in enumerate(self.layers):
            if index == 2:
                given = self.between(given, first)
            made = layer(given)
            given = made.hidden if isinstance(made, Made) else made() if callable(made) else made
        return self.head(given)


def made(block: type[Block] = Block, between: Callable[[Tensor, Tensor], Tensor] = nothing) -> Model:
    torch.manual_seed(3)
    return Model(block, between).eval()


def given() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))}


def compared(reference: nn.Module, candidate: nn.Module, **options: Any) -> divergence.Comparison:
    return divergence.compare(reference, candidate, given(), **options)


def first(result: divergence.Comparison) -> str | None:
    return result.first_divergence.site if result.first_divergence else None


BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda x, _: x * 3.0,
    "scaled in place": lambda x, _: x.mul_(3.0),
    "injected": lambda x, first: x + first,
    "skipped to": lambda x, first: torch.cat((x[..., : WIDTH // 2], first[..., WIDTH // 2 :]), -1),
    "normed": lambda x, _: nn.functional.layer_norm(x, (WIDTH,)),
    "rounded": lambda x, _: x.bfloat16().float(),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("lost", [True, False])
def test_what_is_lost_or_added_between_layers_is_an_error_of_the_next(between: str, lost: bool) -> None:
    having, without = made(between=BETWEEN[between]), made()
    result = compared(having, without) if lost else compared(without, having)
    assert result.verdict == "fail"
    assert first(result) == "layers.2.hidden"


@pytest.mark.parametrize("between", BETWEEN)
def test_the_same_between_layers_on_both_sides_passes_and_does_not_hide_a_fault(between: str) -> None:
    reference = made(between=BETWEEN[between])
    rounded, faulty = copy.deepcopy(reference), copy.deepcopy(reference)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    result = compared(reference, rounded, replay="always", precision="bf16-weights")
    assert (result.verdict, result.policy.judged) == ("pass", "introduced")
    faulty.layers[2].down.weight.data *= 1.05  # type: ignore[union-attr, operator]
    result = compared(reference, faulty, replay="always")
    assert (first(result), result.policy.judged) == ("layers.2.hidden", "introduced")
    assert [s.site for s in result.sites if s.verdict == "fail"] == ["layers.2.hidden"]


@pytest.mark.parametrize("block", [Block, InPlace, Object])
def test_a_fault_is_found_whatever_a_layer_does_with_its_input_and_returns(block: type[Block]) -> None:
    reference = made(block)
    faulty = copy.deepcopy(reference)
    faulty.layers[1].down.weight.data *= 1.05  # type: ignore[union-attr, operator]
    result = compared(reference, faulty)
    assert [s.site for s in result.sites if s.verdict == "fail"] == ["layers.1.hidden"]
    assert result.site("layers.1.hidden").introduced_floor is not None
    assert (result.site("layers.1.hidden").introduced_floor or 1.0) < 1e-6
    assert [(c.id, c.site) for c in result.causes] == [("weight_scale", "layers.1.hidden")]
    assert compared(reference, made(Block)).verdict == "pass"


def test_layers_that_return_nothing_with_a_tensor_are_an_error() -> None:
    with pytest.raises(SourceError, match="layers return nothing in which a tensor was found"):
        compared(made(Opaque), made())


def hooked(scale: float, *, before: bool = False) -> Model:
    model = made()
    if before:
        model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * scale,))
    else:
        model.layers[1].register_forward_hook(lambda _, __, output: output * scale)
    return model


@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_a_layer_belong_to_it(before: bool) -> None:
    plain, other = made(), hooked(1.05, before=before)
    for reference, candidate in ((plain, other), (other, plain)):
        assert first(compared(reference, candidate)) == "layers.1.hidden"
    result = compared(other, hooked(1.05, before=before))
    assert result.verdict == "pass"
    faulty = hooked(1.05, before=before)
    faulty.layers[2].down.weight.data *= 1.05  # type: ignore[union-attr, operator]
    assert first(compared(other, faulty, replay="always")) == "layers.2.hidden"


def test_hooks_are_left_as_they_were() -> None:
    model = hooked(1.05)
    before = list(model.layers[1]._forward_hooks)
    compared(model, made())
    assert list(model.layers[1]._forward_hooks) == before
    assert "forward" not in model.layers[1].__dict__


class Mutating(Model):
    def forward(self, x: Tensor) -> Any:
        x.add_(1.0)
        return super().forward(x)


def mutating() -> Mutating:
    torch.manual_seed(3)
    return Mutating().eval()


def test_a_model_that_writes_into_its_inputs_changes_nobody_else_s() -> None:
    inputs = given()
    before = inputs["x"].clone()
    assert divergence.compare(mutating(), mutating(), inputs).verdict == "pass"
    assert torch.equal(inputs["x"], before)
    assert divergence.compare(mutating(), made(), inputs).verdict == "fail"


class Ending(Model):
    def forward(self, x: Tensor) -> Any:
        raise SystemExit(0)


def test_a_forward_that_ends_the_program_is_an_error() -> None:
    with pytest.raises(SourceError, match="ended the program"):
        compared(made(), Ending().eval())


class Unrepeatable(Model):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.how == "random in a layer":
            x = x + 1e-3 * torch.rand_like(x)
        output = super().forward(x)
        if self.how == "random":
            output = output + 1e-3 * torch.rand_like(output)
        return output * self.calls if self.how == "counting" else output


@pytest.mark.parametrize("how", ["random", "random in a layer", "counting"])
def test_a_reference_that_cannot_be_repeated_is_an_error(how: str) -> None:
    torch.manual_seed(3)
    reference = Unrepeatable(how).eval()
    faulty = made()
    faulty.head.weight.data *= 1.02
    with pytest.raises(SourceError, match=r"gives something else when it is run again \("):
        compared(reference, faulty)


class Returning(Model):
    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(super().forward(x))


@pytest.mark.parametrize(
    "how", [lambda _: None, lambda t: t.tolist(), lambda t: iter([t]), lambda t: t.numpy(), str]
)
def test_outputs_without_tensors_are_an_error(how: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(3)
    model = Returning(how).eval()
    with pytest.raises(SourceError, match="in which there are no tensors"):
        compared(model, made())


def test_compiled_modules_are_an_error() -> None:
    whole, inside = torch.compile(made()), made()
    inside.layers[1].compile()
    for model in (whole, inside):
        assert isinstance(model, nn.Module)
        with pytest.raises(SourceError, match=r"compiled by torch\.compile"):
            compared(model, made())


def with_values(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[..., 0] = value
    return tensor


def giving(value: float | None) -> Returning:
    torch.manual_seed(3)
    return Returning(lambda t: t if value is None else with_values(t, value)).eval()


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("value", [None, NAN, INF, -1e30])
def test_inf_in_the_reference_has_to_be_the_same_inf(value: float | None) -> None:
    result = compared(giving(-INF), giving(value))
    assert (result.verdict, first(result)) == ("fail", "output.0")
    assert result.site("output.0").reason == "12 of 60 values are others where the reference's are Inf"
    assert compared(giving(-INF), giving(-INF)).verdict == "pass"


@pytest.mark.parametrize("value", [None, INF])
def test_nan_in_the_reference_alone_cannot_be_judged(value: float | None) -> None:
    result = compared(giving(NAN), giving(value))
    assert result.verdict == "error"
    assert "the reference is NaN at 12 of 60 values" in result.site("output.0").reason
    assert compared(giving(NAN), giving(NAN)).verdict == "pass"


class Pair(Model):
    """Returns two outputs of one shape."""

    def __init__(self, *, exchanged: bool = False) -> None:
        super().__init__()
        self.exchanged = exchanged

    def forward(self, x: Tensor) -> Any:
        first = super().forward(x)
        return (-first, first) if self.exchanged else (first, -first)


def pair(*, exchanged: bool = False) -> Pair:
    torch.manual_seed(3)
    return Pair(exchanged=exchanged).eval()


def test_outputs_that_an_export_gives_in_another_order_are_remarked_on(tmp_path: Path) -> None:
    for exchanged in (False, True):
        path = exported(pair(exchanged=exchanged), given(), tmp_path / f"{exchanged}.onnx")
        notes = compared(pair(), path).notes  # type: ignore[arg-type]
        assert any("in another order than the reference's" in note for note in notes) is exchanged


def test_an_output_in_another_layout_is_remarked_on() -> None:
    torch.manual_seed(3)
    turned = Returning(lambda t: t.transpose(1, 2)).eval()
    result = compared(giving(None), turned)
    assert any(note.startswith("output.0: the candidate has it in another layout") for note in result.notes)
