"""What operations on a form share: a class built anew from a changed config, filled tensor by tensor; and its statement."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..model.checks import one_of, refuse
from ..model.configuration_variform import AUTO_MAP

logger = logging.get_logger(__name__)

SHOWN = 8  # names in a message


class Statement(NamedTuple):
    """What a model of another form has kept of the original, and what not; printing it gives plain lines.

    Attributes:
        equal_up_to: {stack: the longest input, in tokens, on which it computes what the original does}; inf where that is
            every input that the original takes, 0 where hardly any is left.
        new_parameters: how many were added.
        kept, lost: the same in words.
    """

    equal_up_to: dict[str, float]
    new_parameters: int
    kept: list[str]
    lost: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.kept, *self.lost])

    def log(self) -> None:
        """What is kept at the level INFO, what is lost as a warning."""
        logger.info("\n".join(self.kept))
        if self.lost:
            logger.warning("\n".join(self.lost))


class Part(NamedTuple):
    """A tensor of the result: the names of what it is made of, and how; None for a copy."""

    sources: tuple[str, ...]
    make: Callable[[], torch.Tensor] | None = None


Plan = Callable[[PreTrainedModel, Mapping[str, torch.Tensor]], Mapping[str, Part]]


def refuse_unfit(model: Any) -> None:
    """Raises `ValueError` for what is not a whole Variform model with plain tensors."""
    names = [name for name, _ in model.named_parameters()] if isinstance(model, torch.nn.Module) else []
    refuse(
        hasattr(model, "peft_config") or any("lora_" in name for name in names),
        "The model holds adapters: call `merge_and_unload()` on the PEFT model first.",
    )
    refuse(
        getattr(model, "hf_quantizer", None) is not None,
        "The model is quantised: load it in a floating-point dtype, and quantise the result.",
    )
    refuse(
        not isinstance(model, PreTrainedModel) or model.config.model_type not in AUTO_MAP,
        f"{type(model).__name__} is not a Variform model: hand in the model itself, or make one of another family's with "
        "`variform.from_hf` first.",
    )
    tensors = [parameter.data for parameter in model.parameters()]
    kinds = sorted({type(tensor).__name__ for tensor in tensors} - {"Tensor"})
    refuse(bool(kinds), f"The model's weights are of type {', '.join(kinds)}: load it whole and unquantised.")
    devices = sorted({str(tensor.device) for tensor in tensors})
    refuse(
        len(devices) > 1 or devices == ["meta"],
        f"The model's weights are on {', '.join(devices)}: load it on one device, and spread the result.",
    )


def by_stack(stacks: Mapping[str, PreTrainedConfig], **values: Any) -> dict[str, dict[str, Any]]:
    """{stack: its fields}. A value that is a dict with stacks for keys holds one for each; None is left out."""
    wanted: dict[str, dict[str, Any]] = {side: {} for side in stacks}
    for name, value in values.items():
        is_by_stack = isinstance(value, dict) and (name != "rope_parameters" or bool(value.keys() & stacks.keys()))
        if value is None and name != "attention_patterns":
            continue
        for side, own in value.items() if is_by_stack else dict.fromkeys(stacks, value).items():
            one_of(name, side, stacks)
            wanted[side][name] = own
    return wanted


def change_config(config: PreTrainedConfig, changes: Mapping[str, Mapping[str, Any]], **of_whole: Any) -> Any:
    """The config with other fields of its stacks. It says no more where it came from: it is another form.

    Args:
        changes: {stack: {field: value}}. of_whole: fields of the config itself, which those of a lone stack are as well.
    """
    values = config.to_dict()
    for side, fields in changes.items():
        own = values[side] if config.is_encoder_decoder else values
        own.update(fields, _name_or_path="")
    return type(config)(**{**values, **of_whole, "origin": None, "_name_or_path": ""})


@torch.no_grad()
def rebuild(model: PreTrainedModel, config: PreTrainedConfig, plan: Plan) -> PreTrainedModel:
    """A model of the same class and another form, with copies of the tensors of `model`.

    Args:
        plan: called with the empty result and the stored tensors by name; gives the tensors of the result that are no copies
            of those of their name.

    Raises:
        ValueError: if a tensor has no place, no source or another shape, or differs from one that it is tied to.
    """
    take_backends(model.config, config)
    with no_init_weights():
        result = type(model)(config)
    result.tie_weights()
    stored, wanted = model.state_dict(keep_vars=True), result.state_dict(keep_vars=True)
    parts = {**{name: Part((name,)) for name in wanted}, **plan(result, stored)}
    used = {source for part in parts.values() for source in part.sources}
    refuse_unmatched([name for name in stored if name not in used], "no place for")
    refuse_unmatched([name for name, part in parts.items() if set(part.sources) - stored.keys()], "no source for")
    filled: dict[int, str] = {}
    for name, target in wanted.items():
        part = parts[name]
        refuse_broken_tie(name, filled.setdefault(id(target), part.sources[0]) if part.sources else None, part, stored)
        value = stored[part.sources[0]].clone() if part.make is None else part.make()
        refuse(
            value.shape != target.shape,
            f"'{name}' has the shape {tuple(value.shape)}, but the form wants {tuple(target.shape)}.",
        )
        target.data = value
        sources = [stored[source] for source in part.sources]
        if target.is_floating_point() and isinstance(target, torch.nn.Parameter):
            target.requires_grad_(all(source.requires_grad for source in sources))
    # Rope's angles and the like: casting a model rounds them with its weights
    dtypes = {name.rpartition(".")[2]: buffer.dtype for name, buffer in model.named_buffers()}
    for name, buffer in result.named_buffers():
        buffer.data = buffer.data.to(model.device, dtypes.get(name.rpartition(".")[2], buffer.dtype))
    return result.train(model.training)


def take_backends(config: PreTrainedConfig, changed: PreTrainedConfig) -> None:
    """Gives a config the backends of attention and experts that another has."""
    configs = {"": config, **{name: getattr(config, name) for name in config.sub_configs}}
    changed._attn_implementation = {name: part._attn_implementation for name, part in configs.items()}
    changed._experts_implementation = {name: part._experts_implementation for name, part in configs.items()}


def refuse_broken_tie(name: str, twin: str | None, part: Part, stored: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` if a tensor is one with another that came from other values. Args: twin: the other's source."""
    if twin is None:
        return
    source = stored[part.sources[0]]
    refuse(
        stored[twin] is not source and not torch.equal(stored[twin], source),
        f"The config ties '{name}' to '{twin}', whose values differ: set `tie_word_embeddings` or "
        "`tie_encoder_decoder_embeddings` to False in the model's config.",
    )


def refuse_unmatched(names: Iterable[str], problem: str) -> None:
    """Raises `ValueError` if there are any."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    refuse(
        bool(names),
        f"The form has {problem} {', '.join(map(repr, names[:SHOWN]))}{more}: hand in a whole model with the weights of its "
        "class alone, and patterns that need no others.",
    )


def take_generation_config(model: PreTrainedModel, result: PreTrainedModel, length: int | None = None) -> None:
    """Copies the generation config, with a `max_length` that was the longest input made `length`, the result's longest."""
    if not model.can_generate():
        return
    result.generation_config = copy.deepcopy(model.generation_config)
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if length is not None and result.generation_config.max_length == longest:
        result.generation_config.max_length = length
