"""Where sites lie in exports of other kinds: TorchScript, stacked and declared caches, fused operators.

Truth is taken from the module itself: forward hooks on its layers, and the cache that it returns.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from divergence.errors import ConfigurationError
from divergence.probes.onnx import OnnxProbe
from divergence.probes.onnx.names import declared_tensor
from divergence.probes.onnx.scopes import find_layers, node_scopes
from tests.exports import laid_out, observed
from tests.models import MODELS, inputs_for
from tests.smollm2 import quiet

pytestmark = pytest.mark.filterwarnings("ignore")

STACKS = {
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "bert": {"": "encoder.layer"},
    "gpt2": {"": "transformer.h"},
    "llama-eager": {"": "model.layers"},
}


class Flat(nn.Module):
    """Takes and gives plain tensors, as exporters want them: logits, then keys and values."""

    def __init__(self, model: Any, names: list[str], *, cache: str = "") -> None:
        super().__init__()
        self.model, self.names, self.cache = model, names, cache

    def forward(self, *inputs: Tensor) -> Any:
        given: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if not isinstance(self.model.config, MODELS["bert"]().config.__class__):
            given["use_cache"] = bool(self.cache)
        out = self.model(**given)
        if not self.cache:
            return out[0]
        layers = out.past_key_values.layers
        if self.cache == "stacked":
            keys = torch.stack([layer.keys for layer in layers], 1)
            return out[0], keys, torch.stack([layer.values for layer in layers], 1)
        return out[0], *(t for layer in layers for t in (layer.keys, layer.values))


def truth(kind: str, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the layers returned, by hooks, and what the cache holds."""
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(_module: Any, _given: Any, out: Any) -> None:
            seen[site] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        return hook

    hooks = [
        layer.register_forward_hook(keep(f"{stack + '.' if stack else ''}layers.{i}.hidden"))
        for stack, path in STACKS[kind].items()
        for i, layer in enumerate(model.get_submodule(path))
    ]
    with torch.no_grad():
        out = model(**inputs, **({} if kind == "bert" else {"use_cache": True}))
    for hook in hooks:
        hook.remove()
    cache = out.get("past_key_values")
    caches = {"": cache}
    if hasattr(cache, "self_attention_cache"):
        caches = {"": cache.self_attention_cache, "cross_": cache.cross_attention_cache}
    prefix = "decoder." if "decoder" in STACKS[kind] else ""
    for cross, part in caches.items():
        for i, layer in enumerate(part.layers if part is not None else ()):
            seen[f"{prefix}layers.{i}.{cross}key"] = layer.keys
            seen[f"{prefix}layers.{i}.{cross}value"] = layer.values
    return seen


def scripted(kind: str, path: Path, inputs: Mapping[str, Tensor]) -> Any:
    """Exports with the TorchScript exporter, which names nodes after modules. Returns the model."""
    model = MODELS[kind]()
    with quiet():
        torch.onnx.export(
            Flat(model, list(inputs)).eval(),
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=17,
        )
    return model


@pytest.mark.parametrize("kind", ["llama-eager", "gpt2", "bert", "t5"])
def test_node_names_of_torchscript_lead_to_every_site(kind: str, tmp_path: Path) -> None:
    inputs = inputs_for(kind)
    model = scripted(kind, tmp_path / "m.onnx", inputs)
    probe = OnnxProbe(tmp_path / "m.onnx")
    seen = observed(probe, inputs)
    for site, wanted in truth(kind, model, inputs).items():
        assert site in seen, site
        assert torch.allclose(laid_out(seen[site]), wanted, rtol=1e-4, atol=1e-5), (site, seen[site].found)
        assert "node names" in seen[site].found
    stacks = probe.run(inputs, lambda _: None).stacks
    assert stacks == (("encoder", "decoder") if "encoder" in STACKS[kind] else ("",))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["declared", "stacked"])
def test_cache_outputs_of_the_dynamo_exporter(cache: str, tmp_path: Path) -> None:
    """A key under its own name is its site; stacked keys are an output, and the sites are found too."""
    inputs, model = inputs_for("llama-eager"), MODELS["llama-eager"]()
    names = ["logits", "keys", "values"]
    if cache == "declared":
        names = ["logits", *(f"present.{i}.{t}" for i in range(3) for t in ("key", "value"))]
    with quiet():
        torch.onnx.export(
            Flat(model, list(inputs), cache=cache).eval(),
            tuple(inputs.values()),
            str(tmp_path / "m.onnx"),
            dynamo=True,
            input_names=list(inputs),
            output_names=names,
            verbose=False,
        )
    seen = observed(OnnxProbe(tmp_path / "m.onnx"), inputs)
    wanted = truth("llama-eager", model, inputs)
    for site, tensor in wanted.items():
        assert torch.allclose(laid_out(seen[site]), tensor, rtol=1e-4, atol=1e-5), site
    outputs = [site for site in seen if site.startswith("output.")]
    if cache == "declared":
        assert outputs == ["output.logits"]
        assert "present.0.key" in seen["layers.0.key"].found
    else:
        assert outputs == ["output.logits", "output.keys", "output.values"]
        assert torch.allclose(seen["output.keys"].tensor[:, 2], wanted["layers.2.key"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("present.3.key", (3, "key")),
        ("present_key_values.11.value", (11, "value")),
        ("past_key_values.0.key", (0, "key")),
        ("present.2.encoder.value", (2, "cross_value")),
        ("present.2.decoder.key", (2, "key")),
        ("key_cache_4", (4, "key")),
        ("present_v_4", (4, "value")),
        ("logits", None),
        ("key_values", None),
        ("hidden_states.3", None),
        ("layers.3.key_norm", None),
    ],
)
def test_names_that_say_what_they_are(name: str, declared: tuple[int, str] | None) -> None:
    assert declared_tensor(name) == declared


def test_layers_are_the_outermost_composite_ones() -> None:
    inner = ("attn.q", "attn", "mlp")
    scopes = [f"m.blocks.{i}.{x}" for i in range(12) for x in inner]
    scopes += [
        "m.stem.0",
        "m.stem.1",
        *(f"m.blocks.0.experts.{i}.{x}" for i in range(2) for x in ("up", "down")),
    ]
    layers = find_layers(scopes)
    assert [layer.index for layer in layers] == list(range(12))
    assert {layer.stack for layer in layers} == {""}


def test_a_stack_takes_the_name_that_the_reference_has_for_it() -> None:
    scopes = [f"m.decoder.layers.{i}.{x}" for i in range(2) for x in ("a", "b")]
    assert {layer.stack for layer in find_layers(scopes)} == {""}
    assert {layer.stack for layer in find_layers(scopes, known={"encoder": 2, "decoder": 2})} == {"decoder"}


def fused(kind: str) -> onnx.ModelProto:
    """One layer with a fused attention operator and rotated keys given as they are."""
    scope = "/model/layers.0"
    common: dict[str, Any] = {"name": f"{scope}/attn/{kind}"}
    size = {"b": 2, "t": 5, "q": 32, "kv": 16}
    inputs = {"x": ["b", "t", "q"], "k": ["b", "t", "kv"], "v": ["b", "t", "kv"]}
    extra: list[Any] = []
    if kind == "Attention":
        node = helper.make_node(kind, ["x", "k", "v"], ["a"], q_num_heads=4, kv_num_heads=2, **common)
    elif kind == "MultiHeadAttention":
        inputs["k"] = inputs["v"] = ["b", "t", "q"]
        node = helper.make_node(kind, ["x", "k", "v"], ["a"], num_heads=4, domain="com.microsoft", **common)
    else:
        extra = [
            helper.make_tensor("past", TensorProto.FLOAT, [2, 2, 0, 8], []),
            helper.make_tensor("lens", TensorProto.INT32, [2], [4, 4]),
            helper.make_tensor("total", TensorProto.INT32, [], [5]),
        ]
        node = helper.make_node(
            kind,
            ["x", "k", "v", "past", "past", "lens", "total"],
            ["a", "present_k", "present_v"],
            num_heads=4,
            kv_num_heads=2,
            domain="com.microsoft",
            **common,
        )
    nodes = [
        node,
        helper.make_node("Relu", ["a"], ["m"], name=f"{scope}/mlp/Relu"),
        helper.make_node("Add", ["x", "m"], ["h"], name=f"{scope}/Add"),
        helper.make_node("Tanh", ["h"], ["y"], name="/model/norm/Tanh"),
    ]
    shaped = {n: [size[d] for d in dims] for n, dims in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in shaped.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shaped["x"])],
        extra,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("kind", ["Attention", "MultiHeadAttention", "GroupQueryAttention"])
def test_keys_of_fused_attention_are_split_into_heads(kind: str, tmp_path: Path) -> None:
    model = fused(kind)
    onnx.save(model, tmp_path / "m.onnx")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        i.name: torch.randn(*(d.dim_value for d in i.type.tensor_type.shape.dim), generator=generator)
        for i in model.graph.input
    }
    seen = observed(OnnxProbe(tmp_path / "m.onnx"), inputs)
    heads = 4 if kind == "MultiHeadAttention" else 2
    for tensor, name in (("key", "k"), ("value", "v")):
        given = inputs[name].reshape(2, 5, heads, 8).transpose(1, 2)
        assert torch.equal(laid_out(seen[f"layers.0.{tensor}"]), given), tensor
    assert "layers.0.hidden" in seen


def test_an_override_wins_and_a_wrong_one_names_the_nearest(tmp_path: Path) -> None:
    onnx.save(fused("Attention"), tmp_path / "m.onnx")
    found = {
        str(s.site): s.found
        for s in OnnxProbe(tmp_path / "m.onnx", sites={"layers.0.hidden": "m"}).describe().sites
    }
    assert "configuration" in found["layers.0.hidden"]
    with pytest.raises(ConfigurationError, match="did you mean 'm'|no value"):
        OnnxProbe(tmp_path / "m.onnx", sites={"layers.0.hidden": "mm"})
    with pytest.raises(ConfigurationError, match="not a site"):
        OnnxProbe(tmp_path / "m.onnx", sites={"layer0": "m"})


def scope_of(metadata: str) -> str | None:
    """The module of a node whose exporter left `metadata` as the names of its scopes."""
    node = helper.make_node("Neg", ["a"], ["b"], name="n")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=metadata)
    return node_scopes([node], lambda name: None, lambda name: [])[0]


@pytest.mark.parametrize("module", ["layers.0.attn", "it's", 'a "quote"', "both ' and \"", "back\\slash"])
def test_scopes_are_read_as_python_writes_them(module: str) -> None:
    assert scope_of(repr(["", "layers.0", module, "view"])) == module


@pytest.mark.parametrize("metadata", ["", "[]", "['view']", "5", "[layers.0, view]", "['layers.0, view"])
def test_metadata_that_names_no_module_gives_no_scope(metadata: str) -> None:
    assert scope_of(metadata) is None


def test_scopes_are_read_while_another_thread_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that use `ast` at once end in a SystemError in some versions of Python."""

    def parse(*_: Any, **__: Any) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    with monkeypatch.context() as patch:  # pytest itself parses what failed
        patch.setattr(ast, "parse", parse)
        scope = scope_of("['', 'layers.0', 'view']")
    assert scope == "layers.0"
