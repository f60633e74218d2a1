"""Pairs of a native model and ours, over seeded random configs of every family and head, and batches to compare them on."""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from native_models import (
    COUNT_SLOTS,
    FIRST_REGULAR_ID,
    OFFSET_BY_PADDING,
    OTHER_SHAPES,
    TAKE_MARKS,
    random_config,
    random_model,
)
from transformers import PreTrainedConfig, PreTrainedModel

from variform.conversion import FAMILIES
from variform.conversion.convert import from_hf
from variform.conversion.engine import inwards
from variform.conversion.family import BOOKKEEPING, LANGUAGE_MODELS, POOLED

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
SEEDS = int(os.environ.get("VARIFORM_SEEDS", "4"))
LENGTHS = torch.tensor([13, 8, 3, 5])  # real tokens of each row
TARGET_LENGTHS = torch.tensor([2, 9, 6, 4])
MARKED = torch.tensor([0.3, 0.0, 0.6, 0.2])  # which part of each row is marked as global
LABELS, QUESTIONS = "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"
CHOICES = "AutoModelForMultipleChoice"
SEQ2SEQ = "variform_encoder_decoder"


class Case(NamedTuple):
    """One native class with one random config."""

    model_type: str
    auto_class: str
    seed: int

    def __str__(self) -> str:
        return f"{FAMILIES[self.model_type].heads[self.auto_class].foreign}-{self.seed}"

    @property
    def shape(self) -> str:
        return FAMILIES[self.model_type].shape

    @property
    def config(self) -> PreTrainedConfig:
        config = random_config(self.model_type, self.seed)
        if self.auto_class == QUESTIONS:
            config.num_labels = 2  # a start and an end
        return config

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each row; BigBird cuts up longer texts than the others."""
        if self.is_reformer:
            return torch.full_like(LENGTHS, 24)
        return 3 * LENGTHS if self.model_type == "big_bird" else LENGTHS

    @property
    def is_reformer(self) -> bool:
        """Whether the native class differentiates in training alone, and gives the second of its streams as hidden states."""
        return OTHER_SHAPES.get(self.model_type, self.model_type) == "reformer"

    @property
    def counts_blocks(self) -> bool:
        """Whether the native class cuts the padded batch into blocks, where ours cuts each text."""
        return self.is_reformer or getattr(self.config, "attention_type", None) == "block_sparse"

    @property
    def sorts_texts(self) -> bool:
        """Whether no cache of ours serves it."""
        return self.is_reformer and "lsh" in self.config.attn_layers

    @property
    def dtype(self) -> torch.dtype:
        """In float32, Reformer's class merges the rounds of a token that sees only itself in steps of 2 ** -7."""
        is_coarse = self.sorts_texts and self.shape == "variform_decoder" and self.config.num_hashes > 1
        return torch.float64 if is_coarse else torch.float32


def all_cases() -> list[Case]:
    cases = []
    for name, family in FAMILIES.items():
        for number, auto_class in enumerate(family.heads):
            is_main = auto_class in LANGUAGE_MODELS
            first, count = (0, SEEDS) if is_main else (number, (SEEDS + 3) // 4)
            cases += [Case(name, auto_class, seed) for seed in range(first, first + count)]
    return cases


def sides(case: Case) -> list[str]:
    """Where the padding may stand: classifiers that natively read the first slot must find the first token there."""
    if case.counts_blocks:
        return ["none"]
    is_pooled = case.auto_class in POOLED and case.shape == "variform_encoder"
    return ["right"] if is_pooled and getattr(case.config, "classifier_pooling", "cls") == "cls" else ["right", "left"]


CASES = all_cases()
CACHED = [
    case
    for case in CASES
    if case.shape != "variform_encoder" and case.auto_class in ("AutoModel", *LANGUAGE_MODELS) and not case.sorts_texts
]
MAIN = [case for case in CASES if case.auto_class in LANGUAGE_MODELS]


class Pair(NamedTuple):
    """A native model, and ours with its weights."""

    native: PreTrainedModel
    ours: PreTrainedModel


@cache
def build(case: Case) -> Pair:
    family = FAMILIES[case.model_type]
    native = random_model(family.foreign_class(case.auto_class), case.config, case.seed).to(case.dtype)
    return Pair(native, from_hf(native))


def padding_mask(lengths: torch.Tensor, side: str) -> torch.Tensor:
    """`(batch, seq)`: 1 for the real tokens of `lengths`, with the padding on the given side; all 1 for "none"."""
    slots = torch.arange(int(lengths.max()))
    mask = (slots < lengths[:, None]).long()
    return {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[side]


def random_ids(mask: torch.Tensor, vocab_size: int, padding: int) -> torch.Tensor:
    return torch.randint(FIRST_REGULAR_ID, vocab_size, mask.shape).where(mask.bool(), torch.tensor(padding))


class Batch(NamedTuple):
    """What the native model and ours are given, which differ in positions alone, and which tokens are real."""

    native: dict[str, torch.Tensor]
    ours: dict[str, torch.Tensor]
    real: torch.Tensor


def make_batch(case: Case, side: str) -> Batch:
    """A padded batch. Padded left, the native class is told positions counted over the real tokens; where it cannot be
    told, ours is told its slots."""
    config, mask = case.config, padding_mask(case.lengths, side)
    inputs = {"input_ids": random_ids(mask, config.vocab_size, config.pad_token_id), "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, mask.shape)
    if case.model_type in TAKE_MARKS:
        marks = torch.rand(mask.shape) < MARKED[:, None]
        if case.auto_class == LABELS:
            marks[:, 0] = True  # by rule, in ours
        inputs["global_attention_mask"] = marks.long()
    if case.auto_class == CHOICES:
        inputs = {name: tensor.view(2, 2, -1) for name, tensor in inputs.items()}
    if case.shape == SEQ2SEQ:
        targets = padding_mask(TARGET_LENGTHS, "right").bool()
        vocab_size = getattr(config, "decoder_vocab_size", config.vocab_size)
        if case.auto_class == "AutoModel":
            inputs["decoder_input_ids"] = random_ids(torch.ones_like(targets), vocab_size, 0)
        else:
            inputs["labels"] = random_ids(targets, vocab_size, -100)
    else:
        inputs |= make_labels(case, inputs["input_ids"], mask.bool())
    native, ours = dict(inputs), dict(inputs)
    if side == "left":
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        if case.model_type in COUNT_SLOTS:
            ours["position_ids"] = torch.arange(mask.shape[1])[None]
        elif case.shape != SEQ2SEQ:
            # RoBERTa's are the rows of its table
            first = config.pad_token_id + 1 if case.model_type in OFFSET_BY_PADDING else 0
            native["position_ids"] = (counted + first).view(inputs["input_ids"].shape)
    return Batch(native, ours, mask.bool())


def make_labels(case: Case, input_ids: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of an encoder's or a decoder's head; -100 for padding."""
    config, nothing, head = case.config, torch.tensor(-100), case.auto_class.removeprefix("AutoModel")
    if head == "ForMaskedLM":
        return {"labels": random_ids(real & (torch.rand(real.shape) < 0.5), config.vocab_size, -100)}
    if head == "ForCausalLM":
        # What stands before the first real token is padding, whose states are nobody's
        return {"labels": input_ids.where(real & (real.cumsum(-1) > 1), nothing)}
    if head == "ForTokenClassification":
        return {"labels": torch.randint(config.num_labels, real.shape).where(real, nothing)}
    if head == "ForMultipleChoice":
        return {"labels": torch.randint(2, (2,))}
    if head == "ForSequenceClassification":
        size = (len(real), config.num_labels)
        if config.problem_type == "regression":
            return {"labels": torch.randn(size)}
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.randint(2, size).float()}
        return {"labels": torch.randint(config.num_labels, (len(real),))}
    if head == "ForQuestionAnswering" and real.all():
        # The native loss reads the logits of padding too, which are nobody's
        return {name: torch.randint(real.shape[1], (len(real),)) for name in ("start_positions", "end_positions")}
    return {}


def assert_same(
    ours: torch.Tensor,
    native: torch.Tensor,
    name: str,
    scale: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Equal within `tolerance` of the largest entry of `scale`; default: of the native tensor."""
    assert ours.shape == native.shape, name
    size = (native if scale is None else scale).abs().max()
    assert size > 0, f"{name}: nothing to compare"
    error = ((ours - native).abs().max() / size).item()
    assert error <= tolerance, f"{name}: {error:.1e}"


def result_of(output: Any, auto_class: str) -> torch.Tensor:
    """What a class computes: logits, or the last hidden states of a base model."""
    if auto_class == QUESTIONS:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.last_hidden_state if auto_class == "AutoModel" else output.logits


def yardstick(name: str, case: Case) -> str:
    """Whose gradient to measure a gradient by: its own, but for a bias that shifts all alike that a softmax compares (keys,
    choices, positions of an answer), whose gradient is rounding, and for a router's, where the shares of tokens cancel: of
    two experts, to a thousandth of the weight's gradient."""
    if name.endswith("mlp.gate.bias"):
        return name.replace("bias", "weight")
    if name.endswith(("k_proj.bias", "k_proj_global.bias")):
        return name.replace("k_proj", "q_proj")
    if case.auto_class in (QUESTIONS, CHOICES) and not name.startswith("model."):
        return name.replace("bias", "weight")
    if case.auto_class == QUESTIONS and name.endswith("norm.bias"):
        return name.replace("bias", "weight")  # the last norm's
    return name


def gradients_by_our_names(case: Case, native: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients of a native model, gone the way of its weights."""
    tensors = native.state_dict(keep_vars=True)

    def gradient(name: str) -> torch.Tensor:
        grad = tensors[name].grad
        return torch.zeros_like(tensors[name]) if grad is None else grad

    weights = native.state_dict()
    conversion = inwards(FAMILIES[case.model_type], native.config, case.auto_class, weights, weights.__getitem__)
    return dict(conversion.run(gradient))


def config_values(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in BOOKKEEPING}


def cases_of(model_type: str, auto_class: str) -> list[Case]:
    return [case for case in CASES if (case.model_type, case.auto_class) == (model_type, auto_class)]
