"""Mistral (arXiv:2310.06825): Llama with one sliding window in all layers."""

from dataclasses import replace
from typing import Any

from ..family import windows
from . import llama


def read(foreign) -> dict[str, Any]:
    window = foreign.sliding_window
    return llama.read(foreign) | {"attention_patterns": ["full" if window is None else f"sliding_window:{window}"]}


def write(form) -> dict[str, Any]:
    return llama.write(form) | {"sliding_window": windows(form)[1]}


FAMILY = replace(
    llama.FAMILY,
    model_type="mistral",
    same={ours: name for ours, name in llama.SAME.items() if ours not in ("attention_bias", "mlp_bias")},
    read=read,
    write=write,
    heads=llama.heads("Mistral", answers="model."),
)
