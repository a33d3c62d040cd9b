"""SmolLM2-135M-Instruct with its real weights, and exports of it, clean and with planted faults."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODELS = Path(os.environ.get("DIVERGENCE_MODELS", Path(__file__).parents[1] / ".models"))
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FAULTY_LAYER = 11
GAIN = 1.02
PROMPT = (
    "The key of layer zero is computed from the input by a norm, one projection and the rotary embedding. "
    "No attention has run yet, and it is already off. Its error grows with the position of the token, while "
    "the value, which takes the same path but for the rotation, is as good as half precision allows. "
    "What does that tell you about the engine, and which operator would you look at first? Explain your "
    "reasoning step by step, and say what you would measure before you changed anything in the network."
)


def available() -> bool:
    """Whether the weights are there (`make setup` fetches them)."""
    return (MODELS / GGUF).is_file()


def load() -> Any:
    """The model in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(MODELS, gguf_file=GGUF, dtype=torch.float32)
    return model.eval()


def inputs(tokens: int | None = None) -> dict[str, Tensor]:
    """The prompt as the model's inputs, `[1, tokens]`; repeated where more tokens are asked for."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(MODELS, gguf_file=GGUF)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    if tokens is not None:
        ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(model: Any, given: dict[str, Tensor], path: Path) -> Path:
    """Exports `model` to ONNX with its weights beside it."""
    cached = model.config.use_cache
    model.config.use_cache = False
    try:
        with quiet():
            program: Any = torch.onnx.export(model, (), kwargs=dict(given), dynamo=True, verbose=False)
            program.save(path, external_data=True)
    finally:
        model.config.use_cache = cached
    return path


def half(model: Any) -> Any:
    """A copy with fp16 parameters; buffers stay in fp32, as transformers loads it."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


@contextlib.contextmanager
def scaled_value(model: Any) -> Iterator[None]:
    """The v_proj of one layer 2 % too large."""
    weight = model.get_submodule(f"model.layers.{FAULTY_LAYER}.self_attn.v_proj").weight
    with torch.no_grad():
        original = weight.clone()
        weight.mul_(GAIN)
        try:
            yield
        finally:
            weight.copy_(original)


@contextlib.contextmanager
def rotary_in_bf16(model: Any) -> Iterator[None]:
    """Position times inverse frequency computed in bfloat16, as a weakly typed engine does."""
    rotary = model.get_submodule("model.rotary_emb")

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = rotary.inv_freq.to(torch.bfloat16)
        angle = position_ids.to(torch.bfloat16)[:, :, None] * inv_freq[None, None, :]
        both = torch.cat((angle, angle), dim=-1).float()
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the chatter of the exporter and of transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
