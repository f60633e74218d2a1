"""Any model, native ones too, in a new form with one call: conversion and surgery joined, and what they preserve measured."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console, Group, RenderableType
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .conversion.convert import auto_class_of_ours, family_of, find_folder, from_hf, refuse_wrapped, saved_architecture
from .fields import ROUTER_COEFFICIENTS, TRAINING_FIELDS
from .model.checks import refuse
from .model.configuration_variform import AUTO_MAP
from .report.costs import stacks_of
from .report.form import as_text
from .surgery import change_experts_layout, sparsify, upcycle
from .surgery.rebuilding import Statement, by_stack, change_config, rebuild, refuse_unfit, take_generation_config
from .surgery.upcycle import CHOICES

OF_SPARSIFY = ("attention_patterns", "max_position_embeddings", "rope_parameters", "rope_scaling")
OF_UPCYCLE = ("num_experts", "num_experts_per_tok", "granularity", "layers", "noise", "seed", "is_exact", *CHOICES)
OF_EXPERTS = ("router_jitter_noise", "router_bias_update_rate", *ROUTER_COEFFICIENTS)
OF_PAIR = ("label_smoothing", "z_loss_coef", *ROUTER_COEFFICIENTS)
ALL = tuple(dict.fromkeys((*OF_SPARSIFY, *OF_UPCYCLE, *TRAINING_FIELDS)))
NEAREST = {
    "sliding_window": '`attention_patterns=["sliding_window:512"]`',
    "layer_types": "`attention_patterns`",
    "mlp_layer_types": "`num_experts` with `layers`",
    "moe_intermediate_size": "`num_experts` with `granularity`",
    "num_shared_experts": "`num_experts`, all of which are routed to",
    "intermediate_size": "`num_experts`, which widens the network that a token may choose",
    "vocab_size": "`model.resize_token_embeddings`",
    "num_labels": "`from_pretrained(..., num_labels=...)`",
    "position_offset": "`max_position_embeddings`",
    "axial_shape": "`max_position_embeddings`",
}


class Measured(NamedTuple):
    """What a model makes of a batch: its first output on real tokens, how many they are, and the mean loss with labels."""

    output: torch.Tensor
    tokens: int
    loss: float | None


class Step(NamedTuple):
    """One operation: what it preserves in words, and on the batch how far the model is from the original since then.

    Attributes:
        difference: the largest absolute one of the first output on real tokens. loss: the mean one; None if not measured.
    """

    name: str
    statement: Statement
    difference: float | None = None
    loss: float | None = None


class Reshaping(NamedTuple):
    """What a reshaped model has kept of the original. Printing it gives plain lines; rich shows a table.

    Attributes:
        original: the class that it was made of. tokens: how many real ones were measured; 0 without a batch.
        loss: of the original, the mean over real tokens; None if not measured.
        steps: in order.
    """

    original: str
    tokens: int
    loss: float | None
    steps: list[Step]

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("operation", style="bold")
        table.add_column("what it preserves of the model before it", ratio=1)
        table.add_column("difference", justify="right")
        table.add_column("mean loss", justify="right")
        table.add_row("", self.original, "", shown(self.loss, ".5f"))
        for step in self.steps:
            words = "\n".join([*step.statement.kept, *(f"But: {line}" for line in step.statement.lost)])
            table.add_row(step.name, words, shown(step.difference, ".1e"), shown(step.loss, ".5f"))
        measured = (
            f"Differences are the largest from {self.original} itself, in evaluation, on the {self.tokens:,} real tokens of "
            "the batch."
        )
        return Group(table, "", measured if self.tokens else "Nothing was measured: give a `batch`.")


def shown(number: float | None, digits: str) -> str:
    return "" if number is None else f"{number:{digits}}"


def reshape(
    model_or_path: PreTrainedModel | str | Path,
    *,
    batch: Mapping[str, torch.Tensor] | None = None,
    auto_class: Any = None,
    return_statement: bool = False,
    **changes: Any,
) -> Any:
    """A model in another form: converted if it is a native one, then sparser, longer, with experts, in whatever is asked for.

    Args:
        model_or_path: a model of the family or of one that `from_hf` takes, a folder, or a repo on the Hub; it stays as it is.
        batch: what the model's forward takes, on which the original and the result are compared after each operation. Without
            labels, a causal language model's are its tokens.
        auto_class: which head to read from a folder; default: as saved.
        return_statement: return what is preserved as well, instead of printing it.
        changes: of `sparsify`: `attention_patterns max_position_embeddings rope_parameters rope_scaling`; of `upcycle`:
            `num_experts num_experts_per_tok granularity layers noise seed is_exact` and the experts' fields; `experts_layout`;
            and fields that only training reads, such as `hidden_dropout` and `router_aux_loss_coef`. Of an encoder-decoder
            for both stacks, or by stack.

    Returns:
        A model of ours in the original's dtype. With `return_statement`, that model and a `Reshaping`.

    Raises:
        ValueError: for a field that would need other weights, or give them another meaning, naming the nearest operation; and
            as the operations do.
    """
    original = load(model_or_path, auto_class, for_measuring=batch is not None)
    model = original
    operations: list[tuple[str, Callable[[Any], tuple[Any, Statement]]]] = []
    if isinstance(original, (str, Path)) or original.config.model_type not in AUTO_MAP:
        operations.append(("from_hf", partial(convert, auto_class=auto_class)))
        form = read_form(original, auto_class)
    else:
        refuse_unfit(original)
        form = original.config
    operations += plan(form, changes)
    before = None if batch is None else measure(original, batch)
    steps = []
    for name, operation in operations:
        model, statement = operation(model)
        after = None if batch is None else measure(model, batch)
        steps.append(Step(name, statement, *compared(before, after)))
    tokens, loss = (0, None) if before is None else (before.tokens, before.loss)
    reshaping = Reshaping(name_of(original), tokens, loss, steps)
    if return_statement:
        return model, reshaping
    Console(highlight=False).print(reshaping)
    return model


def load(source: PreTrainedModel | str | Path, auto_class: Any, for_measuring: bool) -> Any:
    """The model itself; or that of a folder: ours, or a native one if it is measured. Else the folder, which is converted."""
    if not isinstance(source, (str, Path)):
        return refuse_wrapped(source)
    folder = find_folder(source)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type in AUTO_MAP:
        name = getattr(auto_class, "__name__", auto_class) or auto_class_of_ours(saved_architecture(config), config)
    elif for_measuring:
        name = family_of(config).auto_class_of(saved_architecture(config), auto_class)
    else:
        return folder
    return getattr(transformers, name).from_pretrained(folder).eval()


def read_form(source: Any, auto_class: Any) -> PreTrainedConfig:
    """The form that a native model or folder has in our words."""
    is_folder = isinstance(source, (str, Path))
    config: Any = AutoConfig.from_pretrained(source) if is_folder else source.config
    family = family_of(config)
    architecture = saved_architecture(config) if is_folder else type(source).__name__
    return family.read_form(config, family.auto_class_of(architecture, auto_class))


def convert(source: Any, auto_class: Any) -> tuple[PreTrainedModel, Statement]:
    """A native model or folder as a model of ours."""
    model = from_hf(source, auto_class=auto_class)
    words = "Equal to the original on every input, every weight and the head included."
    return model, Statement(dict.fromkeys(stacks_of(model.config), float("inf")), 0, [words], [])


def name_of(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def plan(form: PreTrainedConfig, changes: Mapping[str, Any]) -> list[tuple[str, Callable]]:
    """The operations that make the changes, in order."""
    changes = {name: value for name, value in changes.items() if name in ALL or not is_so(form, name, value)}
    for name, value in changes.items():
        refuse_impossible(form, name, value)
    given = {name: value for name, value in changes.items() if value is not None}
    patterns = given.pop("attention_patterns", None)
    of_sparsify = {name: given.pop(name) for name in OF_SPARSIFY if name in given}
    operations: list[tuple[str, Callable]] = []
    if patterns is not None or of_sparsify:
        if patterns is None:
            patterns = {side: stack.attention_patterns for side, stack in stacks_of(form).items()}
        operations.append(("sparsify", partial(sparsify, patterns=patterns, **of_sparsify, return_statement=True)))
    if "num_experts" in given:
        names = (*OF_UPCYCLE, *ROUTER_COEFFICIENTS)
        of_upcycle = {name: given.pop(name) for name in names if name in given}
        operations.append(("upcycle", partial(upcycle, **of_upcycle, return_statement=True)))
    refuse_useless(form, given)
    if "experts_layout" in given:
        layout = given.pop("experts_layout")
        change = partial(change_experts_layout, experts_layout=layout, return_statement=True)
        operations.append(("change_experts_layout", change))
    if given:
        operations.append(("training", partial(change_training, fields_of_training=given)))
    return operations


def is_so(form: PreTrainedConfig, name: str, value: Any) -> bool:
    """Whether every stack has this value already."""
    places = [form] if hasattr(form, name) and not form.is_encoder_decoder else list(stacks_of(form).values())
    return all(hasattr(place, name) and getattr(place, name) == value for place in places)


def refuse_impossible(form: PreTrainedConfig, name: str, value: Any) -> None:
    """Raises `ValueError` for a change that no operation makes, with the nearest one."""
    if name in ALL:
        return
    if name in NEAREST:
        raise ValueError(f"`{name}={value!r}` is no change that keeps a model's weights: use {NEAREST[name]}.")
    known = {f.name for place in (form, *stacks_of(form).values()) for f in fields(type(place))}  # type: ignore[arg-type]
    if name in known:
        raise ValueError(
            f"`{name}={value!r}` would need other weights or give them another meaning, and no operation makes that change; "
            "build a new form with `variform.from_config`; `help(variform.reshape)` lists the changes that there are."
        )
    near = difflib.get_close_matches(name, [*ALL, *NEAREST, *sorted(known)], n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise ValueError(f"`{name}` is neither a field nor an argument of an operation.{hint}")


def refuse_useless(form: PreTrainedConfig, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what is left over of `upcycle` without experts, and for experts' fields of a dense model."""
    has_experts = any(stack.num_experts for stack in stacks_of(form).values())
    for name, value in given.items():
        if name in TRAINING_FIELDS:
            refuse(
                name in OF_EXPERTS and not has_experts,
                f"`{name}={value!r}` is of experts, and the model has none: give `num_experts` as well.",
            )
        elif name != "experts_layout" or not has_experts:
            reason = "changes a router that is there" if has_experts else "is of experts, and the model has none"
            refuse(True, f"`{name}={value!r}` {reason}: `upcycle` takes it, together with `num_experts`.")


def change_training(
    model: PreTrainedModel, fields_of_training: Mapping[str, Any]
) -> tuple[PreTrainedModel, Statement]:
    """The model with other fields that only training reads."""
    values = dict(fields_of_training)
    of_pair = {name: values.pop(name) for name in OF_PAIR if name in values}
    config = change_config(model.config, by_stack(stacks_of(model.config), **values), **of_pair)
    config.origin = model.config.origin
    result = rebuild(model, config, lambda result, stored: {})
    take_generation_config(model, result)
    words = "Equal to the original in evaluation; training reads " + ", ".join(
        f"{name}={value}" for name, value in fields_of_training.items()
    )
    return result, Statement(dict.fromkeys(stacks_of(config), float("inf")), 0, [words + "."], [])


def real_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`(batch, seq)`: which positions of the first output are real tokens."""
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    if "decoder_input_ids" in batch:
        return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask.bool()
    first = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))[..., 0]
    return torch.ones_like(first, dtype=torch.bool)


@torch.no_grad()
def measure(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Measured:
    """Runs a model in evaluation on a batch."""
    batch = dict(batch)
    is_pair = bool(model.config.is_encoder_decoder)
    labels = batch.get("labels")
    if labels is None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        labels = batch["labels"] = batch["input_ids"].masked_fill(~real_tokens(batch), -100)
    real = real_tokens(batch)
    if is_pair and labels is not None and "decoder_input_ids" not in batch:
        real = labels != -100
    was_training = model.training
    batch = {name: value.contiguous().to(model.device) for name, value in batch.items()}
    outputs = model.eval()(**batch, return_dict=True)
    model.train(was_training)
    output = outputs[0] if outputs.get("loss") is None else outputs[1]
    if output.ndim >= 2 and output.shape[:2] == real.shape:
        output = output[real.to(output.device)]
    loss = outputs.get("loss")
    return Measured(output.float().cpu(), int(real.sum()), None if loss is None else loss.item())


def compared(before: Measured | None, after: Measured | None) -> tuple[float | None, float | None]:
    """The largest difference of two outputs, and the second loss."""
    if before is None or after is None:
        return None, None
    return (after.output - before.output).abs().max().item(), after.loss
