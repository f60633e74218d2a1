"""A trained model made sparser and longer: on inputs that fit its windows it computes what it did."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.checks import one_of, refuse
from ..model.patterns import parse
from ..model.positions import RotaryEmbedding
from ..report.costs import stacks_of
from ..report.form import patterns as in_words
from ..report.form import rope as rope_in_words
from .rebuilding import (
    Part,
    Statement,
    by_stack,
    change_config,
    rebuild,
    refuse_unfit,
    take_generation_config,
)

ROPE_SCALINGS = ("dynamic", "linear", "yarn")
# The table of learned positions, in every stack, and that of axial ones whose rows count the others through
POSITIONS = ("embeddings.positions.weight", "embeddings.positions.rows")
# A projection for global tokens, beside the one for all
GLOBAL = re.compile(r"_global\.(weight|bias)$")


def sparsify(
    model: PreTrainedModel,
    patterns: Any,
    max_position_embeddings: int | dict[str, int] | None = None,
    *,
    rope_parameters: dict[str, Any] | None = None,
    rope_scaling: str | None = None,
    return_statement: bool = False,
) -> Any:
    """The model with other attention patterns and, if asked for, more positions, as Longformer was made of RoBERTa.

    Where the patterns hide nothing of an input, it computes what the original does. Learned positions are repeated behind
    the first ones, which stay (arXiv:2004.05150, sec. 5). Rope stays as it is unless an argument says otherwise.

    Args:
        model: any model of the family; it stays as it is.
        patterns: `attention_patterns`, such as `["sliding_window:256"]`. Of an encoder-decoder for both stacks, or
            `{"encoder": [...], "decoder": [...]}`, where a stack that is left out stays as it is.
        max_position_embeddings: longest input in tokens, for all stacks or by stack. Default: as it is.
        rope_parameters: in place of the original's, for all stacks or by stack.
        rope_scaling: stretches rope from the original's length to `max_position_embeddings`. "linear" (arXiv:2306.15595)
            divides all angles and "yarn" (arXiv:2309.00071) the slow ones: both change every input. "dynamic" changes none
            that is shorter than the original's length; it goes by the length of each input from `max_position_embeddings`
            on, which therefore stays as it is and limits nothing.
        return_statement: return what is preserved and what is not, instead of logging it.

    Returns:
        A model of the same class, with copies of the tensors, on the original's device, in its dtypes and mode. A
        `max_length` for generation that was the longest input grows with it. With `return_statement`, that model and a
        `Statement`. (A tokenizer has a limit of its own, `model_max_length`.)

    Raises:
        ValueError: for a model that is not ours, that holds adapters, or is quantised, sharded or not whole; for a form that
            the config refuses; for fewer positions than there are; for rope arguments that do not fit.
    """
    refuse_unfit(model)
    stacks = stacks_of(model.config)
    wanted = by_stack(
        stacks,
        attention_patterns=patterns,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope_parameters,
    )
    refuse_unfit_rope(stacks, wanted, rope_scaling)
    result = rebuild(model, reshape(model.config, wanted, rope_scaling), plan_tables)
    lengths = {
        side: wanted[side].get("max_position_embeddings", stack.max_position_embeddings)
        for side, stack in stacks.items()
    }
    take_generation_config(model, result, lengths.get("decoder"))
    statement = compare(model, result, lengths)
    if return_statement:
        return result, statement
    statement.log()
    return result


def reshape(config: PreTrainedConfig, wanted: Mapping[str, dict[str, Any]], rope_scaling: str | None) -> Any:
    """The config with the fields that are wanted of each stack."""
    prefixes = {side: f"{side}." if config.is_encoder_decoder else "" for side in wanted}
    stacks = stacks_of(config)
    return change_config(
        config, {side: reshape_stack(stacks[side], wanted[side], rope_scaling, prefixes[side]) for side in wanted}
    )


def reshape_stack(
    stack: PreTrainedConfig, wanted: Mapping[str, Any], rope_scaling: str | None, prefix: str
) -> dict[str, Any]:
    """The fields of one stack that change. Args: prefix: what stands before a field's name in a message."""
    trained = stack.max_position_embeddings
    # Refuses what cannot be, and knows the type of each layer, by which rope parameters are given
    draft = type(stack)(**{**stack.to_dict(), **wanted, "rope_parameters": None, "position_embedding_type": "none"})
    length = draft.max_position_embeddings
    refuse(
        length < trained,
        f"`{prefix}max_position_embeddings={length}` is below the original's {trained}, and no position is taken away: give "
        "at least as many, or leave it out.",
    )
    if stack.position_embedding_type == "axial":
        rows, columns = stack.axial_shape
        return {"axial_shape": [max(rows, math.ceil(length / columns)), columns], **wanted}
    if stack.position_embedding_type != "rope":
        return dict(wanted)
    if "rope_parameters" in wanted:
        ropes = by_type(wanted["rope_parameters"], draft.layer_types)
        refuse_partial_rope(stack, ropes)
    else:
        ropes = keep_rope(stack, draft.layer_types)
    if rope_scaling is not None and length > trained:
        ropes = {name: stretch(rope, rope_scaling, trained, length) for name, rope in ropes.items()}
    first, *others = ropes.values()
    changed = {**wanted, "rope_parameters": first if all(rope == first for rope in others) else ropes}
    if any(rope.get("rope_type") == "dynamic" for rope in ropes.values()):
        changed["max_position_embeddings"] = trained  # transformers scales from there on
    return changed


def refuse_unfit_rope(
    stacks: Mapping[str, PreTrainedConfig], wanted: Mapping[str, dict[str, Any]], rope_scaling: str | None
) -> None:
    """Raises `ValueError` for rope arguments without a use, or that contradict each other."""
    given = {side: own["rope_parameters"] for side, own in wanted.items() if "rope_parameters" in own}
    for rope in given.values():
        refuse(not isinstance(rope, dict), f"`rope_parameters={rope!r}` is not a dict.")
    if not given and rope_scaling is None:
        return
    name, sides = ("rope_parameters", given.keys()) if rope_scaling is None else ("rope_scaling", stacks.keys())
    turned = [side for side in sides if stacks[side].position_embedding_type == "rope"]
    schemes = " and ".join(sorted({repr(stacks[side].position_embedding_type) for side in sides}))
    refuse(not turned, f"`{name}` is given, but `position_embedding_type={schemes}`: leave it out.")
    if rope_scaling is None:
        return
    one_of("rope_scaling", rope_scaling, ROPE_SCALINGS)
    refuse(bool(given), "`rope_scaling` and `rope_parameters` are both given, and both say how rope is: give one.")
    lengths = {side: wanted[side].get("max_position_embeddings") for side in turned}
    is_longer = any(isinstance(n, int) and n > stacks[side].max_position_embeddings for side, n in lengths.items())
    refuse(
        not is_longer,
        f"`rope_scaling={rope_scaling!r}` stretches rope to a larger `max_position_embeddings`: give one.",
    )


def by_type(rope_parameters: dict[str, Any], layer_types: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{layer type: its rope parameters}."""
    return {name: rope_parameters.get(name, rope_parameters) for name in sorted(set(layer_types))}


def rope_of(stack: PreTrainedConfig, layer_type: str) -> dict[str, Any]:
    """The rope parameters of a layer type, with the factor that transformers else derives from the form's length."""
    rope = dict(stack.rope_parameters_of(layer_type))
    if rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = stack.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope


def keep_rope(stack: PreTrainedConfig, layer_types: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{layer type: the rope parameters that its layers have in the original}.

    Args:
        stack: of the original. layer_types: of the result, one a layer.

    Raises:
        ValueError: if they have different ones: a config gives one to all layers of a type.
    """
    ropes: dict[str, dict[str, Any]] = {}
    for before, after in zip(stack.layer_types, layer_types):
        rope = rope_of(stack, before)
        refuse(
            ropes.setdefault(after, rope) != rope,
            f"`attention_patterns` puts layers of different `rope_parameters` into one type, {after!r}: {ropes[after]} and "
            f"{rope}; keep them apart, or choose `rope_parameters`.",
        )
    return ropes


def refuse_partial_rope(stack: PreTrainedConfig, ropes: Mapping[str, dict[str, Any]]) -> None:
    """Raises `ValueError` if rope parameters leave out what would then silently be another value than the original's."""
    for rope in ropes.values():
        for key in ("rope_theta", "partial_rotary_factor"):
            originals = {rope_of(stack, name).get(key) for name in stack.layer_types} - {None}
            refuse(
                bool(originals) and key not in rope,
                f"`rope_parameters={rope}` leaves `{key}` out; the original has {' and '.join(map(str, originals))}.",
            )


def stretch(rope: dict[str, Any], rope_scaling: str, trained: int, length: int) -> dict[str, Any]:
    """Rope parameters for `length` tokens from those for `trained`."""
    refuse(
        rope["rope_type"] != "default",
        f"`rope_scaling={rope_scaling!r}` stretches rope of type 'default', and the original's is {rope['rope_type']!r}: "
        "choose `rope_parameters`.",
    )
    stretched = {**rope, "rope_type": rope_scaling, "factor": length / trained}
    if rope_scaling == "yarn":
        stretched["original_max_position_embeddings"] = trained
    return stretched


def same_rotation(before: PreTrainedConfig, after: PreTrainedConfig) -> float:
    """The longest input that all layers of two stacks turn alike; inf for any, 0 for none."""
    longest = math.inf
    if before.position_embedding_type != "rope":
        return longest
    for types in set(zip(before.layer_types, after.layer_types)):
        first, second = (RotaryEmbedding(stack, name) for stack, name in zip((before, after), types))
        if first.attention_scaling != second.attention_scaling or not torch.equal(first.inv_freq, second.inv_freq):
            return 0
        ropes = [rope_of(stack, name) for stack, name in zip((before, after), types)]
        if ropes[0] != ropes[1]:
            longest = min(longest, *map(first_growth, ropes, (before, after)))
    return longest


def first_growth(rope: Mapping[str, Any], stack: PreTrainedConfig) -> float:
    """The longest input that is turned by the angles of the shortest."""
    if rope["rope_type"] == "dynamic":
        return stack.max_position_embeddings - 1  # after a longer one, transformers goes back to them only below
    return rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else math.inf


def plan_tables(result: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """The tensors that are more than copies: longer tables of positions; projections for global tokens, from those for all."""
    parts = {}
    for name, target in result.state_dict(keep_vars=True).items():
        source = name if name in stored else GLOBAL.sub(r".\1", name)
        if name.endswith(POSITIONS) and source in stored:
            table: Any = result.get_submodule(name.rpartition(".")[0])
            make = partial(repeat_positions, stored[source], len(target), getattr(table, "offset", 0))
            parts[name] = Part((source,), make)
        elif source != name:
            parts[name] = Part((source,))
    return parts


def repeat_positions(table: torch.Tensor, rows: int, offset: int) -> torch.Tensor:
    """`(rows, size)`: a table of positions, repeated from the first one on.

    The rows before `offset` are no positions: they stay, and are not repeated.
    """
    positions, count = table[offset:], rows - offset
    times = math.ceil(count / len(positions))
    return torch.cat((table[:offset], positions.repeat(times, 1)[:count]))


def whole_length(pattern: Mapping[str, Any], is_causal: bool) -> float:
    """The longest input of which an entry of `attention_patterns` hides nothing; inf for any."""
    return parse(dict(pattern)).longest_whole(is_causal)


def layer_patterns(stack: PreTrainedConfig) -> list[dict[str, Any]]:
    """The entry of each layer."""
    return [stack.attention_patterns[i % len(stack.attention_patterns)] for i in range(stack.num_hidden_layers)]


def farthest(stack: PreTrainedConfig) -> float:
    """The largest distance at which a layer is known to look; inf for any."""
    windows = [pattern for pattern in layer_patterns(stack) if pattern["name"] == "sliding_window"]
    if len(windows) < stack.num_hidden_layers:
        return math.inf
    return max(whole_length(pattern, stack.is_causal_stack) - 1 for pattern in windows)


def largest_full_length(before: PreTrainedConfig, after: PreTrainedConfig) -> float:
    """The longest input of which the patterns of two stacks show every layer the same; inf for any."""
    longest = math.inf
    for patterns in zip(layer_patterns(before), layer_patterns(after)):
        if patterns[0] != patterns[1]:
            longest = min(longest, *(whole_length(pattern, before.is_causal_stack) for pattern in patterns))
    return longest


def equal_up_to(before: PreTrainedConfig, after: PreTrainedConfig) -> float:
    """The longest input on which two stacks of the same weights compute the same; inf for all that the first one takes."""
    longest = min(largest_full_length(before, after), same_rotation(before, after))
    return math.inf if longest >= (before.longest_table or math.inf) else longest


def compare(model: PreTrainedModel, result: PreTrainedModel, lengths: Mapping[str, int]) -> Statement:
    """What a model keeps of the one that it was made of. Args: lengths: the longest inputs that were asked for."""
    stacks, reshaped = stacks_of(model.config), stacks_of(result.config)
    equal = {side: equal_up_to(stack, reshaped[side]) for side, stack in stacks.items()}
    limits = {math.inf: "whatever the original takes", 0: "no more than one token"}
    reads = [f"the {side} reads {limits.get(n, f'up to {n:,} tokens')}" for side, n in equal.items()]
    added = result.num_parameters() - model.num_parameters()
    kept, lost = [f"Equal to the original where {' and '.join(reads)}.", f"New parameters: {added:,}."], []
    for side, before in stacks.items():
        after, subject = reshaped[side], f"The {side}'s "
        seen = largest_full_length(before, after)
        if seen < math.inf:
            words = f"{in_words(after)}; in the original: {in_words(before)}"
            lost.append(f"Beyond {seen:,} tokens, the {side}'s layers see: {words}.")
        lost += [subject + line for line in changed_rotation(before, after)]
        if lengths[side] > after.max_position_embeddings:
            stays = f"`max_position_embeddings` stays {after.max_position_embeddings:,}"
            kept.append(f"{subject}{stays}: dynamic scaling begins there, and longer inputs run.")
        if lengths[side] > before.max_position_embeddings and same_rotation(before, after) == math.inf:
            is_near = farthest(after) < before.max_position_embeddings
            if is_near and before.position_embedding_type not in ("learned", "axial", "sinusoidal"):
                kept.append(
                    f"{subject}layers look no farther than {farthest(after):,} tokens: no distance is new to them."
                )
            else:
                lost.append(subject + untrained(before, lengths[side]))
    return Statement(equal, added, kept, lost)


def changed_rotation(before: PreTrainedConfig, after: PreTrainedConfig) -> list[str]:
    """In words, how the rope of a stack differs from the original's, and what follows for a cache."""
    longest, lines = same_rotation(before, after), []
    if longest < math.inf:
        since = f"beyond {longest:,} tokens" if longest else "on every input"
        lines.append(f"positions become {rope_in_words(after)}: queries and keys turn otherwise {since}.")
        if longest and after.is_causal_stack:
            lines.append("cached keys stay turned as they were when read: generation past it is not the full forward.")
    return lines


def untrained(before: PreTrainedConfig, length: int) -> str:
    """In words, what of the positions up to `length` no training has seen."""
    trained = before.max_position_embeddings
    distances = f"distances of {trained:,} tokens and more were never trained"
    return {
        "axial": f"positions {before.longest_table or 0:,} and more repeat those from 0 on, and were never trained.",
        "learned": f"positions {trained:,} to {length - 1:,} repeat those from 0 on, and were never trained.",
        "sinusoidal": f"positions {trained:,} to {length - 1:,} were never trained.",
        "rope": f"{distances}: `rope_scaling` or `rope_parameters` can bring them near to those that were.",
        "alibi": f"{distances}: their penalties go on in proportion.",
        "transformer_xl": f"{distances}: their sines go on as those before.",
        "relative_bias": f"{distances}: from {before.relative_attention_max_distance:,} on, all share one bias.",
        "none": f"{distances}; there are no position embeddings that could show it.",
    }[before.position_embedding_type]
