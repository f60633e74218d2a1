"""Models of full attention to sparsify, and how far one computes what another does."""

import math
from typing import Any

import pytest
import torch
from tiny import STACK, build, inputs, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM

from variform.surgery import Statement, sparsify

TRAINED = STACK["max_position_embeddings"]
LONGER = 4 * TRAINED - 1  # no multiple of the original's length
WINDOW = 5
PATTERNS = [f"sliding_window:{WINDOW}"]
HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
# What fits: both ways there are as many tokens on either side of a query as the window has
FITS = {"encoder": WINDOW + 1, "decoder": WINDOW}
SCHEMES: dict[str, dict[str, Any]] = {
    "none": {},
    "learned": {"position_offset": 2},
    "sinusoidal": {"position_offset": 2},
    "axial": {},
    "rope": {"num_key_value_heads": 1},
    "relative_bias": {"relative_attention_num_buckets": 8},
    "alibi": {},
    "transformer_xl": {},
}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
on_every_form = pytest.mark.parametrize(
    ("shape", "scheme"), [(shape, scheme) for shape in HEADS for scheme in SCHEMES], ids=lambda value: value
)


def original(
    shape: str, scheme: str = "rope", auto_class: Any = None, attn_implementation: str = "sdpa", **fields: Any
):
    """A model with a head, of full attention."""
    fields = {"position_embedding_type": scheme, **SCHEMES[scheme], **fields}
    if shape == "encoder_decoder":
        fields = {"encoder": fields, "decoder": fields, "eos_token_id": None}
    config = tiny(shape, **{"eos_token_id": None, **fields})
    return build(config, auto_class or HEADS[shape], attn_implementation=attn_implementation)


def stated(model, *args: Any, **kwargs: Any) -> tuple[Any, Statement]:
    return sparsify(model, *args, return_statement=True, **kwargs)


def feed(config, length: int, side: str | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `length` tokens; of an encoder-decoder for one stack, and 2 tokens, which fit any window, for the other."""
    if not config.is_encoder_decoder:
        return {"input_ids": inputs(length=length, seed=seed)}
    source, target = (length, 2) if side == "encoder" else (2, length)
    return {"input_ids": inputs(length=source, seed=seed), "decoder_input_ids": inputs(length=target, seed=seed + 1)}


@torch.no_grad()
def gap(model, result, length: int, side: str | None = None) -> float:
    """The largest difference of their first outputs on an input of `length` tokens."""
    batch = feed(model.config, length, side)
    return (model(**batch)[0] - result(**batch)[0]).abs().max().item()


def check_claim(model, result, statement: Statement) -> None:
    """Equal up to the length that is claimed, and different on one token more, for each stack."""
    for side, longest in statement.equal_up_to.items():
        if longest == math.inf:
            assert gap(model, result, TRAINED, side) < 1e-5
            continue
        assert 1 <= longest < TRAINED
        assert gap(model, result, int(longest), side) < 1e-5
        assert gap(model, result, int(longest) + 1, side) > 1e-4


def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 14}
    return BertForMaskedLM(BertConfig(vocab_size=19, max_position_embeddings=TRAINED, **sizes))
