"""A form on one screen, and what differs between two."""

import io
import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import groupby
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from ..forms import config_from_dict
from .costs import Costs, cache_dtype, count_costs, default_length, stacks_of, subtract

SHAPES = {
    "variform_encoder": "encoder: a token sees both ways",
    "variform_decoder": "decoder: a token sees itself and the past",
    "variform_encoder_decoder": "encoder-decoder: the decoder sees its past and the encoder's states",
}
PLACEMENTS = {
    "pre": "before each sublayer (pre)",
    "post": "after each residual sum (post)",
    "sandwich": "before and after each sublayer (sandwich)",
    "reordered": "after each sublayer, within the residual (reordered)",
}
POOLED = {"first": "the first token", "last": "the last token", "mean": "the mean of the tokens"}

LABEL_WIDTH = len("cross-attention")

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


def describe(config: PreTrainedConfig, name: str | None = None) -> RenderableType:
    """The form of `config` in words, with its costs, within 100 columns and 40 lines.

    Args:
        config: any config of the family.
        name: what to call it in the title. Default: its shape alone.
    """
    stacks = stacks_of(config)
    is_pair = len(stacks) > 1
    source = stacks["encoder"].hidden_size if is_pair else None
    columns = [describe_stack(stack, source if stack.is_causal_stack else None) for stack in stacks.values()]
    table = Table(box=None, show_header=is_pair, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", min_width=LABEL_WIDTH)
    for side in stacks:
        table.add_column(side, ratio=1)
    for label in columns[0]:
        if any(column[label] for column in columns):
            table.add_row(label, *(column[label] for column in columns))
    below = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    below.add_column(style="bold", min_width=LABEL_WIDTH)
    below.add_column()
    for label, words in {**describe_whole(config), **describe_costs(config)}.items():
        below.add_row(label, words)
    title = Text.assemble((f"{name}, " if name else "", "bold"), SHAPES[config.model_type])
    return Group(title, "", table, "", below)


def describe_stack(config: PreTrainedConfig, source_size: int | None = None) -> dict[str, str]:
    """What makes up one stack, in words, by topic; an empty text where it has nothing of a topic.

    Args:
        config: the stack's config.
        source_size: width of the encoder's states that it attends to; None for no cross-attention.
    """
    words = {
        "layers": f"{config.num_hidden_layers}, {config.hidden_size:,} wide" + shared_layers(config),
        "tokens": f"{config.vocab_size:,}; " + embeddings(config),
        "positions": positions(config),
        "norm": norm(config),
        "attention": attention(config),
        "patterns": patterns(config),
        "cross-attention": f"the same heads, to the encoder's states, {source_size:,} wide" if source_size else "",
    }
    words["feed-forward"] = joined(
        f"{'gated ' if config.gated_mlp else ''}{config.hidden_act}, {config.intermediate_size:,} wide",
        config.mlp_bias and "biases",
    )
    words["residuals"] = joined(
        config.parallel_residual and "attention and feed-forward in parallel",
        config.layer_scale_init is not None and f"branches scaled, from {config.layer_scale_init:g}",
    )
    rates = [("hidden", config.hidden_dropout), ("attention", config.attention_dropout)]
    rates += [("activation", config.activation_dropout), ("classifier", config.classifier_dropout)]
    rates += [("whole layers", config.layerdrop)]
    words["dropout"] = ", ".join(f"{where} {rate:g}" for where, rate in rates if rate) or "none"
    return words


def describe_whole(config: PreTrainedConfig) -> dict[str, str]:
    """What stands on the last stack, in words: the heads and the loss."""
    last = list(stacks_of(config).values())[-1]
    has_one_table = config.is_encoder_decoder and config.tie_encoder_decoder_embeddings
    words = {
        "head": joined(
            "shares the token embeddings" if config.tie_word_embeddings else "weights of its own",
            has_one_table and "encoder and decoder share one table of embeddings",
            last.lm_head_transform and f"after {transform(last)}",
            last.lm_head_bias and "a bias a token",
            last.logit_scale != 1 and f"logits times {last.logit_scale:.4g}",
            last.final_logit_softcapping and f"logits capped at {last.final_logit_softcapping:g}",
        )
    }
    if not config.is_encoder_decoder:
        words["classifiers"] = joined(
            f"read {POOLED[last.classifier_pooling]}",
            last.pooler and f"after dense and {last.pooler_act} (pooler)",
            last.classifier_transform and f"after {transform(last)}",
            not last.classifier_bias and "no bias",
        )
    words["training"] = joined(
        f"initial weights of standard deviation {last.initializer_range:g}",
        config.label_smoothing and f"label smoothing {config.label_smoothing:g}",
        config.z_loss_coef and f"z-loss {config.z_loss_coef:g}",
    )
    return words


def describe_costs(config: PreTrainedConfig) -> dict[str, str]:
    """What the form costs, in words."""
    costs, length = count_costs(config), default_length(config)
    text = f"a text of {length:,} tokens"
    words = {
        "parameters": f"{units(costs.parameters)} ({costs.parameters:,})",
        "arithmetic": f"{units(costs.flops)}FLOP a token, one forward pass over {text}"
        + (" and a source as long" if config.is_encoder_decoder else ""),
    }
    decoder = stacks_of(config).get("decoder")
    if decoder is None:
        return words
    window = decoder.sliding_window
    words["cache"] = joined(
        f"{units(costs.cache_bytes)}B a token of context, in {dtype_name(cache_dtype(config))}",
        window and f"{units(costs.cache_bytes_past_window)}B from token {window} on, where windows are full",
        config.is_encoder_decoder and f"{units(costs.source_cache_bytes)}B a token of the source",
    )
    return words


def transform(config: PreTrainedConfig) -> str:
    has_bias = config.mlp_bias if config.head_bias is None else config.head_bias
    return f"dense{'' if has_bias else ' (no bias)'}, {config.head_act or config.hidden_act} and norm"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def joined(*parts: str | bool | float | None) -> str:
    """The parts that there are, with semicolons."""
    return "; ".join(str(part) for part in parts if part)


def shared_layers(config: PreTrainedConfig) -> str:
    groups = config.num_hidden_groups or config.num_hidden_layers
    if groups == config.num_hidden_layers:
        return ""
    return (
        f"; {groups} set{'s' if groups > 1 else ''} of weights, each for {config.num_hidden_layers // groups} layers"
    )


def embeddings(config: PreTrainedConfig) -> str:
    scale = config.embedding_scale
    return joined(
        f"embeddings {config.embedding_size:,} wide",
        scale != 1 and ("times the root of their width" if scale == "sqrt" else f"times {scale:.4g}"),
        config.type_vocab_size and f"{config.type_vocab_size} token type{'s' if config.type_vocab_size > 1 else ''}",
        config.embedding_norm and "normalised",
    )


def positions(config: PreTrainedConfig) -> str:
    longest = f"{config.max_position_embeddings:,}"
    words = {
        "none": "none",
        "learned": f"learned, one vector for each of {longest}",
        "sinusoidal": f"sinusoidal, {config.sinusoidal_layout}, {config.sinusoidal_exponent}",
        "relative_bias": f"a learned bias for each of {config.relative_attention_num_buckets} buckets of distances, up to "
        f"{config.relative_attention_max_distance} (T5)",
        "alibi": "a penalty in proportion to the distance (ALiBi)",
    }.get(config.position_embedding_type)
    has_table = config.position_embedding_type in ("learned", "sinusoidal")
    offset = has_table and config.position_offset and f"from row {config.position_offset}"
    return joined(
        words or rope(config), offset, config.position_embedding_type != "learned" and f"made for {longest} tokens"
    )


def rope(config: PreTrainedConfig) -> str:
    by_type = {name: config.rope_parameters_of(name) for name in dict.fromkeys(config.layer_types)}
    words = {name: rope_words(parameters) for name, parameters in by_type.items()}
    if len(set(words.values())) == 1:
        return "rotary, " + next(iter(words.values()))
    return "rotary, " + ", ".join(
        f"{text} in {name.removesuffix('_attention')} layers" for name, text in words.items()
    )


def rope_words(parameters: dict[str, Any]) -> str:
    """`{"rope_type": "linear", "rope_theta": 1e4, "factor": 2}` as "linear, base 10,000, factor 2"."""
    rest = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    kind = parameters.get("rope_type", "default")
    words = [] if kind == "default" else [kind]
    words += [f"base {parameters['rope_theta']:,.10g}"]
    words += [f"{key.replace('_', ' ')} {plain(value)}" for key, value in rest.items() if value is not None]
    return ", ".join(words)


def norm(config: PreTrainedConfig) -> str:
    is_layer_norm = config.norm_type == "layer_norm"
    return joined(
        f"{'layer norm' if is_layer_norm else 'RMS norm'} {PLACEMENTS[config.norm_placement]}",
        "and at the end" if config.final_norm else "none at the end",
        config.skip_first_norm and "none before the first attention",
        is_layer_norm and not config.norm_bias and "no bias",
        config.norm_unit_offset and "times 1 + weight",
        f"eps {config.norm_eps:g}",
    )


def attention(config: PreTrainedConfig) -> str:
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = f"{queries} heads, " if keys == queries else f"{queries} heads of queries, {keys} of keys and values, "
    biased = [projection for projection in "qkvo" if projection in config.biased_projections]
    scale = config.attention_scale
    return joined(
        f"{heads}{config.head_dim} wide",
        bool(biased) and ("biases" if len(biased) == 4 else f"biases on {', '.join(biased)}"),
        config.qk_norm and f"queries and keys normalised, {'each head' if config.qk_norm == 'head' else 'whole'}",
        scale is not None and not math.isclose(scale, config.head_dim**-0.5) and f"scores times {scale:.4g}",
        config.attn_logit_softcapping and f"scores capped at {config.attn_logit_softcapping:g}",
        config.attention_sinks and "a sink a head",
    )


def pattern_period(config: PreTrainedConfig) -> list[str]:
    """The shortest list of patterns that, tiled over the layers, gives each layer its own."""
    names = [f"sliding_window:{p['window']}" if "window" in p else p["name"] for p in config.attention_patterns]
    layers = [names[i % len(names)] for i in range(config.num_hidden_layers)]
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(layers[i] == layers[i % n] for i in range(len(layers))))


def patterns(config: PreTrainedConfig) -> str:
    """The pattern of each layer from the first to the last, such as "(5 x sliding_window:512, full) x 4, full"."""
    period = pattern_period(config)
    times, rest = divmod(config.num_hidden_layers, len(period))
    if len(period) == 1:
        return f"{times} x {period[0]}"
    if times == 1:
        return runs(period + period[:rest])
    return f"({runs(period)}) x {times}" + (f", {runs(period[:rest])}" if rest else "")


def runs(names: list[str]) -> str:
    """`["full", "full", "none"]` as "2 x full, none"."""
    counted = [(name, len(list(run))) for name, run in groupby(names)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counted)


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
    costs_of_a = count_costs(a, length, cache_dtype(a))

    def change(model_type: str, values: dict[str, Any]) -> Costs | None:
        try:
            changed = rebuild(model_type, {**of_a, **values})
            return subtract(count_costs(changed, length, cache_dtype(a)), costs_of_a)
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
    of_a, of_b = (count_costs(config, length, dtype) for config in (a, b))
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


def units(number: float, signed: bool = False) -> str:
    """`1234567` as "1.23 M": three digits and a power of a thousand."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            digits = f"{number / size:{'+' if signed else ''}#.3g}".rstrip(".")
            return f"{digits} {unit}"
    return f"{number:{'+' if signed else ''}.0f} "


def plain(value: Any) -> str:
    """A field's value as one reads it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return runs([plain(item) for item in value])
    if isinstance(value, dict):
        words = {key: f"({plain(item)})" if isinstance(item, dict) else plain(item) for key, item in value.items()}
        return ", ".join(f"{key} {words[key]}" for key, item in value.items() if item is not None)
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """What is shown, as plain lines of at most `width` columns, for a log."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
