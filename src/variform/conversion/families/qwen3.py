"""Qwen3 (arXiv:2505.09388): Llama with normalised queries and keys, and windows in some layers."""

from dataclasses import replace

from . import llama, qwen2

FAMILY = replace(
    qwen2.FAMILY,
    model_type="qwen3",
    same={ours: name for ours, name in llama.SAME.items() if ours != "mlp_bias"},
    fixed={"qk_norm": "head"},
    heads=llama.heads("Qwen3"),
)
