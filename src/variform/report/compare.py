"""What differs between two forms, and what each difference costs."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from ..forms import config_from_dict
from ..nearest import untold
from .arithmetic import count_closed
from .costs import Costs, cache_dtype, default_length, stacks_of, subtract
from .form import SHAPES, dtype_name, pattern_period, plain, units

# What says where a form comes from or how it is run, not what it is
NOT_FORM = {f.name for f in fields(PreTrainedConfig)} | {"variform_version", "origin", "use_cache"}
NOT_FORM |= {"encoder", "decoder", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
# What a pair has beside its stacks, and a single stack among its fields
OF_THE_PAIR = {"tie_word_embeddings", "tie_encoder_decoder_embeddings", "label_smoothing", "z_loss_coef"}
# A field that is equal to another unless it is set
FOLLOWS = {
    "embedding_size": "hidden_size",
    "num_key_value_heads": "num_attention_heads",
    "num_hidden_groups": "num_hidden_layers",
    "head_act": "hidden_act",
    "head_bias": "mlp_bias",
}


class Difference(NamedTuple):
    """One field in which form B differs from form A."""

    field: str  # in a pair `encoder.x`, `decoder.x`, or `both.x` where the stacks share the change
    a: Any
    b: Any
    change: Costs | None  # of A's costs when this field alone changes; None where the config refuses that


def differences(a: PreTrainedConfig, b: PreTrainedConfig, length: int | None = None) -> list[Difference]:
    """Every field in which form B differs from form A, and what that change alone does to the costs of A.

    Resolved values are compared. What follows another field unless it is set (see `FOLLOWS`) is a difference of its own
    only where one of the forms sets it; else it goes with that field. Special tokens, dtype, labels and what the platform
    writes into a config are no part of a form. Of forms of different shapes, the fields are compared that both have; a
    single stack stands beside the pair's stack of its kind.

    Args:
        a, b: any configs of the family.
        length: of the text in tokens, for the FLOPs. Default: the longest that both were made for, at most 2048.
    """
    length = min(default_length(a), default_length(b)) if length is None else length
    is_paired = a.is_encoder_decoder or b.is_encoder_decoder
    of_a, of_b = form_fields(a, is_paired), form_fields(b, is_paired)
    shared = [field for field in of_a if field in of_b]
    for field in shared:
        side, dot, name = field.rpartition(".")
        leader = f"{side}{dot}{FOLLOWS.get(name, name)}"
        if leader != field and of_a[field] == of_a[leader] and of_b[field] == of_b[leader]:
            of_a[field] = of_b[field] = None
    costs_of_a = count_closed(a, length, cache_dtype(a))

    def change(model_type: str, values: dict[str, Any]) -> Costs | None:
        try:
            with untold():
                changed = rebuild(model_type, {**of_a, **values})
            return subtract(count_closed(changed, length, cache_dtype(a)), costs_of_a)
        except ValueError:
            return None

    found = []
    if a.model_type != b.model_type:
        shape_a, shape_b = (SHAPES[config.model_type].partition(":")[0] for config in (a, b))
        found.append(Difference("shape", shape_a, shape_b, None if is_paired else change(b.model_type, {})))
    for name, members in merge_sides([field for field in shared if of_a[field] != of_b[field]], of_a, of_b).items():
        changed = {field: of_b[field] for field in members}
        found.append(Difference(name, of_a[members[0]], of_b[members[0]], change(a.model_type, changed)))
    return found


def form_fields(config: PreTrainedConfig, is_paired: bool = False) -> dict[str, Any]:
    """Every field that is part of the form, with its resolved value.

    Args:
        config: any config of the family; a pair's stacks come as `encoder.x` and `decoder.x`.
        is_paired: name a single stack's fields so as well.
    """
    is_pair = config.is_encoder_decoder
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_FORM} if is_pair else {}
    for side, stack in stacks_of(config).items():
        for name, value in resolved(stack).items():
            if name in OF_THE_PAIR and is_pair:
                continue
            is_sided = (is_pair or is_paired) and name not in OF_THE_PAIR
            values[f"{side}.{name}" if is_sided else name] = value
    return values


def resolved(stack: PreTrainedConfig) -> dict[str, Any]:
    """The fields of one stack, each choice written in one way only."""
    values = {f.name: getattr(stack, f.name) for f in fields(stack) if f.name not in NOT_FORM}
    values["num_hidden_groups"] = stack.num_hidden_groups or stack.num_hidden_layers
    values["head_act"] = stack.head_act or stack.hidden_act
    values["head_bias"] = stack.mlp_bias if stack.head_bias is None else stack.head_bias
    values["attention_patterns"] = pattern_period(stack)
    values["attention_bias"] = [projection for projection in "qkvo" if projection in stack.biased_projections]
    if stack.attention_scale is not None and math.isclose(stack.attention_scale, stack.head_dim**-0.5):
        values["attention_scale"] = None
    if stack.embedding_scale != 1 and stack.embedding_scale != "sqrt":
        is_root = math.isclose(stack.embedding_scale, stack.embedding_size**0.5)
        values["embedding_scale"] = "sqrt" if is_root else stack.embedding_scale
    return values


def rebuild(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    """The config with these fields, named as `form_fields` names them."""
    nested: dict[str, Any] = {"model_type": model_type}
    for field, value in values.items():
        side, _, name = field.rpartition(".")
        target = nested.setdefault(side, {}) if side and model_type == "variform_encoder_decoder" else nested
        target[name] = value
    return config_from_dict(nested)


def merge_sides(differing: list[str], of_a: dict[str, Any], of_b: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the differences with their fields: `both.x` for a change that encoder and decoder share."""
    merged: dict[str, list[str]] = {}
    for field in differing:
        side, _, name = field.rpartition(".")
        twins = [f"{other}.{name}" for other in ("encoder", "decoder")] if side else [field]
        is_shared = all(
            twin in differing and of_a[twin] == of_a[field] and of_b[twin] == of_b[field] for twin in twins
        )
        merged[f"both.{name}" if side and is_shared else field] = twins if is_shared else [field]
    return merged


def compare(
    a: PreTrainedConfig, b: PreTrainedConfig, names: tuple[str, str] = ("A", "B"), length: int | None = None
) -> RenderableType:
    """The differences of two forms as a table: what each change alone adds to the costs of A, and the totals.

    Args:
        a, b: any configs of the family. names: what to call them.
        length: as for `differences`.
    """
    length = min(default_length(a), default_length(b)) if length is None else length
    dtype = cache_dtype(a)
    rows = differences(a, b, length)
    of_a, of_b = (count_closed(config, length, dtype) for config in (a, b))
    figures = {"parameters": "parameters", "flops": "FLOP", "cache_bytes": "cache"}
    if any(costs.cache_bytes != costs.cache_bytes_past_window for costs in (of_a, of_b)):
        figures["cache_bytes_past_window"] = "past window"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("field", style="bold", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for heading in figures.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.field, plain(row.a), plain(row.b), *cells(row.change, figures))
    table.add_section()
    table.add_row("all together", "", "", *cells(subtract(of_b, of_a), figures))
    for name, costs in zip(names, (of_a, of_b)):
        table.add_row(name, "", "", *cells(costs, figures, is_change=False))
    notes = [
        f"FLOP: a token, one forward pass over {length:,} tokens. Cache: a token of context, {dtype_name(dtype)}."
    ]
    if any(row.change is None for row in rows):
        notes.append("*: possible only together with others.")
    title = Text(f"From {names[0]} to {names[1]}: what each change alone adds")
    return Group(title, table, Text("\n".join(notes), "dim"))


def cells(costs: Costs | None, figures: Iterable[str], is_change: bool = True) -> list[Text]:
    """The figures of a form or, with signs, of a change: "-" where nothing changes, "*" where the change is refused."""
    if costs is None:
        return [Text("*", "dim") for _ in figures]
    texts = []
    for name in figures:
        number, unit = getattr(costs, name), "B" if name.startswith("cache") else ""
        is_same = is_change and number == 0
        texts.append(Text("-", "dim") if is_same else Text(units(number, signed=is_change) + unit))
    return texts
