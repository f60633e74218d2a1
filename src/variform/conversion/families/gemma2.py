"""Gemma 2 (arXiv:2408.00118): Gemma 3 with one rope, soft-caps on scores and logits, and plain queries and keys."""

from dataclasses import replace
from typing import Any

from . import gemma3_text, llama


def write(form) -> dict[str, Any]:
    return gemma3_text.write(form) | llama.write(form)


LLAMA = llama.heads("Gemma2")

FAMILY = replace(
    gemma3_text.FAMILY,
    model_type="gemma2",
    same=gemma3_text.SAME | {"attn_logit_softcapping": "attn_logit_softcapping"},
    fixed=gemma3_text.FIXED | {"qk_norm": None},
    write=write,
    inert=frozenset({"sliding_window"}),  # `layer_types` says where windows are
    heads={name: head for name, head in LLAMA.items() if name != "AutoModelForQuestionAnswering"},
)
