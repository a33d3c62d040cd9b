"""A file of functions that load models, for sources such as `pytorch:model.py:load`."""

MODEL = """
import torch
from tests.models import llama

def load():
    return llama()

def faulty():
    model = llama()
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.v_proj").weight.mul_(1.02)
    return model

def raises():
    raise ValueError("no weights here")
"""
