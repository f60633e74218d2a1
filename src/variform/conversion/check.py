"""Does a converted checkpoint compute what the original does? Both run on real text."""

import inspect
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..model.configuration_variform import AUTO_MAP
from . import FAMILIES
from .convert import VOCABULARIES, auto_class_of_ours, family_of, quiet, saved_architecture

TOLERANCE = 1e-5  # relative to the largest entry, float32

# Opening lines of Melville, Austen and Carroll
TEXTS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing "
    "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.",
]
COMPARED = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
RANDOM_TOKENS = 32


class Check(NamedTuple):
    """How far two models are apart.

    Attributes:
        differences: {output: the largest difference on real tokens, relative to the largest entry of the original}.
        tokens: how many real tokens were read.
        is_text: whether they came from text; without a tokenizer they are random.
    """

    differences: dict[str, float]
    tokens: int
    is_text: bool

    @property
    def is_exact(self) -> bool:
        return max(self.differences.values()) <= TOLERANCE


@torch.no_grad()
def check_conversion(original: str | Path, converted: str | Path) -> Check:
    """Runs the models of two folders, one native and one ours, in float32 on the same padded batch.

    Args:
        original: what was converted. converted: what came out; it also brings the tokenizer.

    Raises:
        ValueError: if the two have different heads.
    """
    models = [load(Path(folder)) for folder in (original, converted)]
    known = next((model for model in models if model.config.model_type in AUTO_MAP), models[1])
    inputs, is_text = make_inputs(Path(converted), known)
    outputs = [model(**inputs) for model in models]
    mask = inputs["attention_mask"].flatten(0, -2)
    real = mask if "decoder_input_ids" not in inputs else inputs["decoder_attention_mask"]
    differences = {}
    for name in COMPARED:
        first, second = (getattr(output, name, None) for output in outputs)
        if first is None or second is None:
            continue
        is_per_token = first.ndim > 1 and first.shape[:2] == real.shape
        first, second = (tensor[real.bool()] if is_per_token else tensor for tensor in (first, second))
        differences[name] = ((first - second).abs().max() / first.abs().max()).item()
    return Check(differences, int(mask.sum()), is_text)


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder in float32, native or ours, by the class that its config names."""
    config = AutoConfig.from_pretrained(folder)
    architecture = saved_architecture(config)
    if config.model_type in AUTO_MAP:
        family = next(family for family in FAMILIES.values() if family.shape == config.model_type)
        model_class = family.our_class(auto_class_of_ours(architecture, config))
    else:
        family = family_of(config)
        model_class = family.foreign_class(family.auto_class_of(architecture))
    with quiet():
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def make_inputs(folder: Path, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], bool]:
    """A batch padded on the right, and whether it is text."""
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, f"max{side}_position_embeddings", 256) for side in ("", "_encoder", "_decoder")]
    limit = min(256, *limits)
    try:
        if not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
            raise FileNotFoundError(f"{folder} has no vocabulary, and some tokenizers load all the same")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": limit}
        batch = tokenizer(TEXTS, return_tensors="pt", **options)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        is_text = True
    except (ImportError, OSError, ValueError):
        ids = torch.randint(config.vocab_size, (len(TEXTS), min(limit, RANDOM_TOKENS)))
        # Some classes take every padding token for padding, whatever the mask says
        ids[ids == model.config.pad_token_id] += -1 if model.config.pad_token_id else 1
        mask, is_text = torch.ones_like(ids), False
    if type(model).__name__.endswith("MultipleChoice"):
        ids, mask = ids[:, None], mask[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_marks(model):
        # The first token, as is usual; without a mask some native classes look for separators, and find none here
        inputs["global_attention_mask"] = torch.zeros_like(mask)
        inputs["global_attention_mask"][..., 0] = 1
    if model.config.is_encoder_decoder:
        # The decoder writes what the encoder reads, as in auto-encoding
        inputs |= {"decoder_input_ids": ids % config.vocab_size, "decoder_attention_mask": mask}
    return inputs, is_text


def takes_marks(model: PreTrainedModel) -> bool:
    """Whether a model, native or ours, has tokens that `global_attention_mask` marks."""
    if model.config.model_type not in AUTO_MAP:
        return "global_attention_mask" in inspect.signature(model.forward).parameters
    patterns = getattr(model.config, "encoder", model.config).attention_patterns
    return any(entry["name"] == "local_global" for entry in patterns)
