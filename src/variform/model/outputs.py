"""What the classes return: Hugging Face's outputs, with what routers have to say in forms with experts (else None)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

# The field of an output that holds the cache, and the name under which `generate` passes it on: "cache" from 5.24 on
CACHE = "cache" if "cache" in Seq2SeqModelOutput.__dataclass_fields__ else "past_key_values"


@dataclass
class StackRouting:
    """Of a stack: the losses of its routers in training, `(batch, 2)`, balance and z, the mean over the layers; and, with
    `output_router_logits`, the logits `(batch, seq, num_experts)` of each layer with experts."""

    router_losses: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class PairRouting:
    """Of an encoder-decoder: the sum of both stacks' losses, and the logits of each."""

    router_losses: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class HeadRouting:
    """Of a head: the balance and z loss, each the mean over sequences and layers, before their coefficients; in training."""

    aux_loss: torch.Tensor | None = None
    router_z_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class PairHeadRouting:
    """Of an encoder-decoder under a head: `HeadRouting` of both stacks, losses added, and the logits of each."""

    aux_loss: torch.Tensor | None = None
    router_z_loss: torch.Tensor | None = None
    encoder_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_router_logits: tuple[torch.Tensor, ...] | None = None


# The fields of Hugging Face's output come first: a tuple begins as it does there


@dataclass
class EncoderOutput(StackRouting, BaseModelOutputWithPooling):
    """Of `VariformEncoderModel`."""


@dataclass
class DecoderOutput(StackRouting, BaseModelOutputWithPastAndCrossAttentions):
    """Of `VariformDecoderModel`."""


@dataclass
class EncoderDecoderOutput(PairRouting, Seq2SeqModelOutput):
    """Of `VariformEncoderDecoderModel`."""


@dataclass
class RoutedMaskedLMOutput(HeadRouting, MaskedLMOutput):
    """Of masked language models."""


@dataclass
class RoutedCausalLMOutput(HeadRouting, CausalLMOutputWithCrossAttentions):
    """Of causal language models."""


@dataclass
class RoutedSeq2SeqLMOutput(PairHeadRouting, Seq2SeqLMOutput):
    """Of conditional language models."""


@dataclass
class RoutedSequenceClassifierOutput(HeadRouting, SequenceClassifierOutput):
    """Of sequence classifiers."""


@dataclass
class RoutedTokenClassifierOutput(HeadRouting, TokenClassifierOutput):
    """Of token classifiers."""


@dataclass
class RoutedQuestionAnsweringOutput(HeadRouting, QuestionAnsweringModelOutput):
    """Of extractive question answering."""


@dataclass
class RoutedMultipleChoiceOutput(HeadRouting, MultipleChoiceModelOutput):
    """Of multiple choice."""


def mean_losses(router_losses: torch.Tensor | None) -> dict[str, Any]:
    """The two losses of a head's output."""
    if router_losses is None:
        return {}
    aux_loss, router_z_loss = router_losses.mean(0)
    return {"aux_loss": aux_loss, "router_z_loss": router_z_loss}
