"""Pegasus (arXiv:1912.08777): BART with sines for positions and norms before the sublayers."""

from dataclasses import replace

import torch

from ..family import Head
from . import bart

SINUSOIDAL = bart.in_both(position_embedding_type="sinusoidal")


def sinusoids(foreign) -> torch.Tensor:
    """The table that the native class computes and stores; ours is not stored."""
    from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

    return PegasusSinusoidalPositionalEmbedding(foreign.max_position_embeddings, foreign.d_model).create_weight()


FAMILY = replace(
    bart.FAMILY,
    model_type="pegasus",
    fixed=bart.FIXED | SINUSOIDAL | bart.in_both(norm_placement="pre"),
    heads={
        "AutoModel": Head("PegasusModel"),
        "AutoModelForSeq2SeqLM": Head("PegasusForConditionalGeneration", bart.LANGUAGE_MODEL),
    },
    computed=bart.FAMILY.computed | {"{side}.embed_positions.weight": sinusoids},
)
