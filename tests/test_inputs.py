from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from divergence.errors import InputError, SourceError
from divergence.inputs import Digesting, called, digest, import_callable, load_inputs
from divergence.masks import token_masks


@pytest.fixture(autouse=True)
def _same_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("divergence_user_", "users_", "neighbour")):
            del sys.modules[name]


def _python(folder: Path, text: str, name: str = "users_file.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _refused(spec: str, base: Path) -> str:
    with pytest.raises(InputError) as raised:
        load_inputs(spec, base)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_safetensors_file_is_loaded_with_bf16(tmp_path: Path) -> None:
    tensors = {"ids": torch.tensor([[1, 2]]), "x": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "in.safetensors")
    loaded = load_inputs("in.safetensors", tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_npz_file_is_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", ids=np.array([[1, 2]]), half=np.ones(2, np.float16))
    loaded = load_inputs("in.npz", tmp_path)
    assert (loaded["ids"].dtype, loaded["half"].dtype) == (torch.int64, torch.float16)


def test_absolute_path_needs_no_base(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros(1))
    assert load_inputs(str(tmp_path / "in.npz"), Path("/nowhere"))


def test_nan_is_kept(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([np.nan, np.inf]))
    loaded = load_inputs("in.npz", tmp_path)["x"]
    assert bool(loaded[0].isnan())
    assert bool(loaded[1].isinf())


def test_file_function_is_called(tmp_path: Path) -> None:
    _python(tmp_path, "import torch\ndef make():\n    return {'x': torch.ones(2, requires_grad=True)}\n")
    loaded = load_inputs("users_file.py:make", tmp_path)
    assert loaded["x"].tolist() == [1.0, 1.0]
    assert not loaded["x"].requires_grad


def test_module_function_is_found_in_the_base_folder(tmp_path: Path) -> None:
    package = tmp_path / "users_package"
    package.mkdir()
    _python(package, "", "__init__.py")
    _python(package, "import numpy as np\ndef make():\n    return {'x': np.zeros(3)}\n", "made.py")
    assert load_inputs("users_package.made:make", tmp_path)["x"].shape == (3,)


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def _from_value(folder: Path, value: Any) -> torch.Tensor:
    _python(folder, "VALUE = None\ndef make():\n    return {'x': VALUE}\n", "users_values.py")
    function = import_callable("users_values:make", folder)
    function.__globals__["VALUE"] = value
    return load_inputs("users_values:make", folder)["x"]


def test_array_is_not_copied(tmp_path: Path) -> None:
    array = ARRAY.copy()
    tensor = _from_value(tmp_path, array)
    array[0, 0] = 42
    assert tensor[0, 0] == 42


@pytest.mark.parametrize(
    "array", [ARRAY[::-1], ARRAY[:, ::-2], ARRAY.T, ARRAY.astype(">f4"), np.float32(3), ARRAY[:0]]
)
def test_array_of_any_layout_keeps_its_values(tmp_path: Path, array: Any) -> None:
    tensor = _from_value(tmp_path, array)
    assert tensor.tolist() == array.tolist()
    assert tensor.dtype == torch.float32


def test_read_only_array_becomes_memory_that_a_model_may_write(tmp_path: Path) -> None:
    array = ARRAY.copy()
    array.flags.writeable = False
    tensor = _from_value(tmp_path, array)
    tensor.zero_()
    assert array.tolist() == ARRAY.tolist()


@pytest.mark.parametrize(
    ("source", "target"),
    [(ml_dtypes.bfloat16, torch.bfloat16), (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn)],
)
def test_array_of_ml_dtypes_keeps_its_dtype(tmp_path: Path, source: Any, target: torch.dtype) -> None:
    tensor = _from_value(tmp_path, ARRAY.astype(source))
    assert tensor.dtype == target
    assert tensor.float().tolist() == ARRAY.tolist()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".PT"])
def test_pickle_is_refused_unopened_with_advice(tmp_path: Path, suffix: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / f"in{suffix}")
    message = _refused(f"in{suffix}", tmp_path)
    assert "is a pickle, which runs code when it is opened" in message
    assert "safetensors.torch.save_file" in message


@pytest.mark.parametrize("spec", ["in.csv", "in", "in.npy"])
def test_other_file_is_refused_with_the_forms(tmp_path: Path, spec: str) -> None:
    assert _refused(spec, tmp_path).endswith("give a .safetensors or .npz file, FILE.py:FUNC or MODULE:FUNC")


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("in.safetensors", "in.npz"):
        assert "no such file; give" in _refused(name, tmp_path)
        (tmp_path / name).write_bytes(b"garbage")
        assert "cannot be read" in _refused(name, tmp_path)
        (tmp_path / name).write_bytes(b"")
        assert "cannot be read" in _refused(name, tmp_path)


def test_npz_of_objects_is_refused_unopened(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object))
    assert "save numeric arrays" in _refused("in.npz", tmp_path)


def test_npz_of_text_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array(["a"]))
    assert "input 'x'" in _refused("in.npz", tmp_path)
    assert "which torch does not have" in _refused("in.npz", tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {}", "users_file.py:make is empty; give the model's inputs by name"),
        ("return [1]", "returned list; return a mapping of input names"),
        ("return None", "returned NoneType; return a mapping"),
        (
            "return {'x': [1, 2]}",
            "input 'x' of users_file.py:make is list; give a torch tensor or a numpy array",
        ),
        ("return {3: 4}", "has the name 3; names of inputs are texts"),
        ("return {'': 4}", "has the name ''; names of inputs are texts"),
        ("\n    raise ValueError('bad\\nworse')", "raised ValueError: bad worse at users_file.py, line 3"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3 at users_file.py, line 2"),
    ],
)
def test_function_that_gives_no_inputs_is_named(tmp_path: Path, body: str, message: str) -> None:
    _python(tmp_path, f"def make():\n    {body}\n")
    assert message in _refused("users_file.py:make", tmp_path)


def test_function_that_needs_arguments_is_named(tmp_path: Path) -> None:
    _python(tmp_path, "def make(x):\n    return {}\n")
    assert "raised TypeError: make() missing 1 required positional argument" in _refused(
        "users_file.py:make", tmp_path
    )


def _source_error(spec: str, base: Path) -> str:
    with pytest.raises(SourceError) as raised:
        import_callable(spec, base)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_missing_function_offers_the_nearest(tmp_path: Path) -> None:
    _python(tmp_path, "def load():\n    pass\nSIZE = 3\n")
    assert _source_error("users_file.py:laod", tmp_path) == (
        "users_file.py: has no function 'laod'; did you mean 'load'?"
    )
    assert _source_error("users_file.py:SIZE", tmp_path) == "users_file.py: 'SIZE' is int, not a function"


def test_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    _python(tmp_path, "")
    assert _source_error("user_file.py:load", tmp_path) == (
        f"{tmp_path / 'user_file.py'}: no such file; did you mean 'users_file.py'?"
    )
    assert _source_error("none/x.py:load", tmp_path).endswith("x.py: no such file")


@pytest.mark.parametrize("spec", ["", "load", ":load", "file.py:"])
def test_spec_without_file_or_function_is_refused_with_the_form(tmp_path: Path, spec: str) -> None:
    assert "write it as FILE.py:FUNC or MODULE:FUNC" in _source_error(spec, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise RuntimeError('no')\n", "RuntimeError: no at users_file.py, line 2"),
        (
            "\n\nimport users_nothing\n",
            "ModuleNotFoundError: No module named 'users_nothing' at users_file.py, line 3",
        ),
        ("import json\n\njson.loads('{')\n", "at users_file.py, line 3"),
        ("x = 1\ny = (\n", "at users_file.py, line 2"),
        ("import sys\nsys.exit('bye')\n", "SystemExit: bye at users_file.py, line 2"),
    ],
)
def test_file_that_raises_is_named_with_type_message_and_its_own_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = _python(tmp_path, text)
    found = _source_error("users_file.py:load", tmp_path)
    assert found.startswith(f"{path}: cannot be imported: ")
    assert message in found
    assert not [name for name in sys.modules if name.startswith("divergence_user_users_file")]


def test_missing_module_and_a_module_that_misses_another_are_told_apart(tmp_path: Path) -> None:
    assert "module users_none.sub: not found in" in _source_error("users_none.sub:load", tmp_path)
    _python(tmp_path, "import users_other\n", "users_broken.py")
    message = _source_error("users_broken:load", tmp_path)
    assert (
        "module users_broken: cannot be imported: ModuleNotFoundError: No module named 'users_other'"
        in message
    )
    _python(tmp_path, "1 / 0\n", "users_raising.py")
    assert "ZeroDivisionError: division by zero at users_raising.py, line 1" in _source_error(
        "users_raising:load", tmp_path
    )


def test_file_imports_its_neighbours_also_when_called(tmp_path: Path) -> None:
    _python(
        tmp_path, "def late():\n    import neighbour_b\n    return neighbour_b.X\nfrom neighbour_a import X\n"
    )
    _python(tmp_path, "X = 1\n", "neighbour_a.py")
    _python(tmp_path, "X = 2\n", "neighbour_b.py")
    assert import_callable("users_file.py:late", tmp_path)() == 2


def test_file_is_run_anew_so_that_an_edit_counts(tmp_path: Path) -> None:
    _python(tmp_path, "def f():\n    return 1\n")
    assert import_callable("users_file.py:f", tmp_path)() == 1
    _python(tmp_path, "def f():\n    return 'another'\n")
    assert import_callable("users_file.py:f", tmp_path)() == "another"


def test_dataclasses_and_methods_of_a_file_work(tmp_path: Path) -> None:
    _python(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Made:\n"
        "    x: int = 4\n    @classmethod\n    def build(cls):\n        return cls()\n",
    )
    assert import_callable("users_file.py:Made.build", tmp_path)().x == 4


def test_digest_ignores_order_and_strides_and_sees_everything_else() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), torch.tensor([True])
    found = digest({"x": x, "y": y})
    assert len(found) == 16
    assert int(found, 16) >= 0
    assert digest({"y": y, "x": x}) == found
    assert digest({"x": x.t().contiguous().t(), "y": y}) == found
    others = [
        {"x": x, "z": y},
        {"x": x.reshape(3, 2), "y": y},
        {"x": x.view(torch.int32), "y": y},
        {"x": x + 1, "y": y},
        {"x": x},
        {},
    ]
    assert len({found, *(digest(other) for other in others)}) == len(others) + 1


@given(st.lists(st.integers(0, 255), max_size=9), st.lists(st.integers(0, 255), max_size=9))
def test_digest_is_equal_for_equal_bytes_only(first: list[int], second: list[int]) -> None:
    digests = [digest({"x": torch.tensor(v, dtype=torch.uint8)}) for v in (first, second)]
    assert (digests[0] == digests[1]) == (first == second)


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
DECODER_MASK = torch.tensor([[1, 1], [0, 1]])


def _lists(masks: dict[str, torch.Tensor]) -> dict[str, list[list[bool]]]:
    assert all(mask.dtype == torch.bool for mask in masks.values())
    return {stack: mask.tolist() for stack, mask in masks.items()}


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.bool(), MASK.float(), MASK.half(), MASK * 7],
    ids=["int", "bool", "float", "half", "packed"],
)
def test_attention_mask_of_any_dtype_is_the_default_mask(mask: torch.Tensor) -> None:
    assert _lists(token_masks({"attention_mask": mask}, [""])) == {"": MASK.bool().tolist()}


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 3, 3),
        torch.ones(3),
        torch.tensor([[0.0, -torch.inf]]),
        torch.tensor([[0.0, torch.finfo(torch.float32).min]]),
        torch.tensor([[1.0, torch.nan]]),
    ],
    ids=["4-D", "1-D", "additive", "additive finite", "NaN"],
)
def test_other_masks_are_passed_over(mask: torch.Tensor) -> None:
    assert token_masks({"attention_mask": mask}, [""]) == {}


def test_without_a_mask_all_tokens_are_valid() -> None:
    assert token_masks({"ids": MASK}, [""]) == {}


def test_encoder_has_the_attention_mask_and_decoder_its_own() -> None:
    both = {"attention_mask": MASK, "decoder_attention_mask": DECODER_MASK}
    masks = _lists(token_masks(both, ["encoder", "decoder"]))
    assert masks == {"encoder": MASK.bool().tolist(), "decoder": DECODER_MASK.bool().tolist()}


def test_decoder_without_a_mask_does_not_get_the_encoders() -> None:
    assert list(token_masks({"attention_mask": MASK}, ["encoder", "decoder"])) == ["encoder"]


def test_text_mask_does_not_count_for_another_modality() -> None:
    assert list(token_masks({"attention_mask": MASK}, ["vision", "language"])) == ["language"]
    assert list(token_masks({"attention_mask": MASK}, ["vision_encoder", "text_decoder"])) == ["text_decoder"]


def test_mask_counts_for_all_stacks_where_none_is_an_encoder() -> None:
    assert list(token_masks({"attention_mask": MASK}, ["local", "global"])) == [""]


def test_only_stack_of_a_decoder_takes_the_decoders_mask() -> None:
    masks = token_masks({"decoder_attention_mask": DECODER_MASK}, [""])
    assert _lists(masks) == {"": DECODER_MASK.bool().tolist()}


@pytest.mark.parametrize("name", ["key_padding_mask", "src_key_padding_mask"])
def test_true_is_padding_in_masks_of_torchs_own_modules(name: str) -> None:
    assert _lists(token_masks({name: MASK == 0}, [""])) == {"": MASK.bool().tolist()}
    assert token_masks({name: (MASK == 0).float()}, [""]) == {}, "of floats they are added"
    both = {name: MASK == 0, "tgt_key_padding_mask": DECODER_MASK == 0}
    masks = _lists(token_masks(both, ["encoder", "decoder"]))
    assert masks == {"encoder": MASK.bool().tolist(), "decoder": DECODER_MASK.bool().tolist()}
    with pytest.raises(InputError, match=f"input '{name}' marks every token as padding"):
        token_masks({name: torch.ones(2, 3, dtype=torch.bool)}, [""])


@pytest.mark.parametrize(("name", "pad"), [("pad", DECODER_MASK), ("not pad", 1 - DECODER_MASK)])
def test_named_mask_is_the_mask_of_all(name: str, pad: torch.Tensor) -> None:
    masks = token_masks({"attention_mask": MASK, "pad": pad}, ["encoder", "decoder"], mask=name)
    assert _lists(masks) == {"": DECODER_MASK.bool().tolist()}


def test_named_mask_that_is_none_is_an_error() -> None:
    with pytest.raises(InputError, match=r"mask 'pda' is not an input; did you mean 'pad'\?"):
        token_masks({"pad": MASK}, [""], mask="pda")
    with pytest.raises(InputError, match=r"mask 'pad' has shape \[3\] and dtype torch\.float32; a mask is"):
        token_masks({"pad": torch.zeros(3)}, [""], mask="pad")


def test_mask_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="input 'attention_mask' marks every token as padding"):
        token_masks({"attention_mask": torch.zeros(2, 3)}, [""])


def test_one_input_is_the_one_that_is_declared_whatever_it_is_called() -> None:
    ids = torch.tensor([[1, 2]])
    assert called(["input.1"], {"ids": ids}, "m.onnx", "graph") == (
        {"input.1": ids},
        ["Input ids was given as input.1, the only one of the graph."],
    )
    assert called(["ids"], {"ids": ids, "mask": ids}, "m.onnx", "graph") == (
        {"ids": ids},
        ["Input mask was left out: the graph does not take it."],
    )


@pytest.mark.parametrize(
    ("declared", "given", "told", "renamed"),
    [
        (["input.1"], ["ids", "mask"], "'input.1' are missing; it takes 'input.1'", '"input.1" = "ids"'),
        (["ids", "at"], ["ids"], "'at' are missing; it takes 'ids', 'at'", '"at" = "OURS"'),
        (["x"], [], "'x' are missing; it takes 'x', given are none;", '"x" = "OURS"'),
    ],
)
def test_inputs_of_other_names_are_not_guessed(
    declared: list[str], given: list[str], told: str, renamed: str
) -> None:
    with pytest.raises(InputError) as raised:
        called(declared, {name: torch.zeros(1) for name in given}, "m.onnx", "graph")
    message = str(raised.value)
    assert message.startswith(f"m.onnx: the graph's inputs {told}")
    assert message.endswith(f"write inputs = {{ {renamed} }} under [sources.NAME] in divergence.toml")


def test_a_digest_that_was_started_is_the_digest() -> None:
    inputs = {"x": torch.randn(2, 3), "ids": torch.tensor([[1, 2]])}
    assert Digesting(inputs).result() == digest(inputs)


def test_a_digest_that_was_started_is_that_of_the_inputs_then() -> None:
    """A model may write into them at once."""
    inputs = {"x": torch.arange(1 << 16)}
    before = digest(inputs)
    digesting = Digesting(inputs)
    inputs["x"].zero_()
    digesting.begin()
    assert digesting.result() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limit", [0, 1 << 20, 1 << 30])
def test_a_digest_of_inputs_on_a_device_is_that_of_the_inputs_then(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("divergence.inputs._ON_DEVICE", limit)
    inputs = {"x": torch.arange(1 << 20), "ids": torch.tensor([[1, 2]])}
    before = digest(inputs)
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    for _ in range(3):
        torch.cuda._sleep(10_000_000)
        copied = {name: tensor.clone() for name, tensor in moved.items()}  # is made late, by the device
        digesting = Digesting(copied)
        for tensor in copied.values():
            tensor.zero_()
        assert digesting.result() == before
