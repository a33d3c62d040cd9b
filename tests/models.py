"""Small random transformers models, one of each kind that the probes must understand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 97
_VOCABULARY: dict[str, Any] = {"vocab_size": VOCABULARY}
_SIZE: dict[str, Any] = {**_VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
_DECODER: dict[str, Any] = {**_SIZE, "intermediate_size": 64}
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _build(kind: str, **config: Any) -> Any:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    implementation = config.pop("attn_implementation", None)
    model = getattr(transformers, kind)
    settings = model.config_class(**config)
    if implementation:
        settings._attn_implementation = implementation
    torch.manual_seed(0)
    return model(settings).eval()


def llama(layers: int = 3, **config: Any) -> Any:
    """Llama: grouped queries, rotary embedding outside of the layers."""
    settings = {
        **_DECODER,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        **config,
    }
    return _build("LlamaForCausalLM", **settings)


def _kind(name: str, **config: Any) -> Callable[..., Any]:
    return functools.partial(_build, name, **config)


MODELS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "llama-eager": functools.partial(llama, attn_implementation="eager"),
    "llama-uncached": functools.partial(llama, use_cache=False),
    "gemma2": _kind("Gemma2ForCausalLM", **_DECODER, num_hidden_layers=3, num_key_value_heads=1, head_dim=8),
    "qwen3": _kind("Qwen3ForCausalLM", **_DECODER, num_hidden_layers=3, num_key_value_heads=2, head_dim=8),
    "gpt2": _kind("GPT2LMHeadModel", **_VOCABULARY, n_embd=32, n_layer=3, n_head=4, **_IDS),
    "bert": _kind("BertModel", **_DECODER, num_hidden_layers=3),
    "opt": _kind(
        "OPTForCausalLM",
        **_SIZE,
        ffn_dim=64,
        num_hidden_layers=3,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "t5": _kind(
        "T5ForConditionalGeneration", **_VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
    "whisper": _kind(
        "WhisperForConditionalGeneration",
        **_VOCABULARY,
        **_IDS,
        d_model=32,
        **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=3,
    ),
}


def inputs_for(kind: str, batch: int = 2, tokens: int = 9) -> dict[str, Tensor]:
    """Inputs for the model called `kind`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    if kind == "whisper":
        features = torch.randn(batch, 8, 20, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids[:, :5]}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        given["decoder_input_ids"] = ids[:, :5]
    return given
