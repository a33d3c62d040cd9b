"""Small random transformers models, one of each kind that the probes must understand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 97
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _build(kind: str, **config: Any) -> Any:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    implementation = config.pop("attn_implementation", None)
    family = kind.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    family = family.removesuffix("LMHeadModel").removesuffix("Model")
    settings = getattr(transformers, f"{family}Config")(**config)
    if implementation:
        settings._attn_implementation = implementation
    torch.manual_seed(0)
    return getattr(transformers, kind)(settings).eval()


def llama(layers: int = 3, **config: Any) -> Any:
    """Llama: grouped queries, rotary embedding outside of the layers."""
    return _build(
        "LlamaForCausalLM",
        **{
            **_SIZE,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "initializer_range": 0.15,
            **config,
        },
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-eager": lambda: llama(attn_implementation="eager"),
    "llama-uncached": lambda: llama(use_cache=False),
    "gemma2": lambda: _build(
        "Gemma2ForCausalLM", **_SIZE, num_hidden_layers=3, num_key_value_heads=1, head_dim=8
    ),
    "qwen3": lambda: _build(
        "Qwen3ForCausalLM", **_SIZE, num_hidden_layers=3, num_key_value_heads=2, head_dim=8
    ),
    "gpt2": lambda: _build("GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, **_IDS),
    "bert": lambda: _build("BertModel", **_SIZE, num_hidden_layers=3),
    "opt": lambda: _build(
        "OPTForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "t5": lambda: _build(
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    ),
    "whisper": lambda: _build(
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=3,
        **_IDS,
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
