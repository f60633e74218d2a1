"""Tiny models and inputs, for tests of any part: `from tiny import build, inputs, tiny`."""

from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

import variform

VOCAB_SIZE = 19
STACK = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
    # Large, so that a forgotten or misplaced term is seen in the output
    "initializer_range": 0.3,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "encoder": variform.VariformEncoderConfig,
    "decoder": variform.VariformDecoderConfig,
    "encoder_decoder": variform.VariformEncoderDecoderConfig,
}


def tiny(shape: str, **fields: Any) -> PreTrainedConfig:
    """A config of a few hundred parameters: "encoder", "decoder" or "encoder_decoder", with `fields` in place of ours.

    For an encoder-decoder, `encoder` and `decoder` are dicts of fields of the stacks.
    """
    if shape != "encoder_decoder":
        return CONFIGS[shape](**{**STACK, "head_dim": 4, **IDS, **fields})
    sides = {side: {**STACK, "head_dim": 4, **fields.pop(side, {})} for side in ("encoder", "decoder")}
    return CONFIGS[shape](**sides, **{**IDS, "decoder_start_token_id": 1, **fields})


def build(config: PreTrainedConfig, auto_class: Any = AutoModel, **kwargs: Any) -> PreTrainedModel:
    """A model in evaluation mode, with every weight moved off its start: no bias is 0, no norm is 1."""
    torch.manual_seed(0)
    model = auto_class.from_config(config, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(batch: int = 2, length: int = 7, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.LongTensor:
    """`(batch, length)` random ids without the special ones, 0 to 2."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad(input_ids: torch.Tensor, left: int, right: int = 0, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`(batch, left + seq + right)` ids with padding on either side, and their attention mask."""
    mask = torch.ones_like(input_ids)
    return (
        torch.nn.functional.pad(input_ids, (left, right), value=pad_id),
        torch.nn.functional.pad(mask, (left, right)),
    )
