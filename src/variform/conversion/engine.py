"""From the tensors of one class to those of another: every one accounted for, none made up."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .family import Family
from .tables import Move, plan

Read = Callable[[str], torch.Tensor]
SHOWN = 8  # names in a message


class Blueprint:
    """What a model of a class holds: its tensors' names and shapes, and which names are one tensor.

    Attributes:
        specs: {name: a tensor on the meta device}, in the order of the model.
        group: {name: the names of the same tensor, the first of which stands for all}.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig):
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
        model.tie_weights()
        self.specs = model.state_dict(keep_vars=True)
        same = defaultdict(list)
        for name, tensor in self.specs.items():
            same[id(tensor)].append(name)
        self.group = {name: names for names in same.values() for name in names}

    def resolve(self, present: Mapping[str, str], read: Read) -> dict[str, str]:
        """{name: the stored name of its tensor}, for every name that `present` has or that is tied to one it has.

        Names that are one tensor here and differ in the checkpoint stay apart: there, they are not tied.

        Args:
            present: {name: the stored name}. read: gives a tensor by its stored name.
        """
        resolved = {}
        for name, names in self.group.items():
            having = [other for other in names if other in present]
            if name not in present:
                if having:
                    resolved[name] = present[having[0]]
                continue
            first = next(other for other in having if other == name or is_equal(read, present[other], present[name]))
            resolved[name] = present[first]
        return resolved


def is_equal(read: Read, name: str, other: str) -> bool:
    """Whether two stored tensors are the same, bit by bit."""
    if name == other:
        return True
    first, second = read(name), read(other)
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


class Recipe(NamedTuple):
    """How a tensor is made: it is result number `result` of `convert` on the stored tensors `sources`."""

    sources: tuple[str, ...]
    convert: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    result: int

    def then(self, move: Move, result: int) -> "Recipe":
        """The recipe of one of the tensors that `move` makes of this one's."""
        return Recipe(self.sources, lambda tensors: move.convert([self.convert(tensors)[self.result]]), result)

    def after(self, merges: Mapping[str, Move]) -> "Recipe":
        """The same from the sources of `merges`, which make some of this one's."""
        if not any(name in merges for name in self.sources):
            return self
        parts = [merges[name].sources if name in merges else (name,) for name in self.sources]

        def convert(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            left = iter(tensors)
            given = [[next(left) for _ in names] for names in parts]
            return self.convert(
                [merges[n].convert(own)[0] if n in merges else own[0] for n, own in zip(self.sources, given)]
            )

        return Recipe(tuple(name for names in parts for name in names), convert, self.result)


@dataclass
class Conversion:
    """How a checkpoint becomes a model of another class.

    Attributes:
        model_class, config: what it becomes.
        recipes: {name: how it is made}, in the order of the source.
        specs: {name: a tensor of its shape and dtype on the meta device}, of all that are made.
        given: {name: a tensor that the foreign class computes and the source does not hold}.
        unused: stored names that have no place in the model.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    recipes: dict[str, Recipe]
    specs: dict[str, torch.Tensor]
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def run(self, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
        """Makes the tensors one after another. Args: read: gives a stored tensor by its name."""
        taken: set[int] = set()
        sources, made = None, []
        for name, recipe in self.recipes.items():
            if recipe.sources != sources:
                sources, taken = recipe.sources, set()
                made = recipe.convert([self.given[s] if s in self.given else read(s) for s in sources])
            # Two names of one result are two tensors: a file takes none twice
            yield name, made[recipe.result].clone() if recipe.result in taken else made[recipe.result]
            taken.add(recipe.result)


def inwards(
    family: Family, foreign: PreTrainedConfig, auto_class: str, stored: Mapping[str, torch.Tensor], read: Read
) -> Conversion:
    """How a foreign checkpoint becomes a Variform model.

    Args:
        foreign: its config. auto_class: which head.
        stored: {name: a tensor of its shape and dtype}, of all that it holds. read: gives a tensor by its name.

    Raises:
        ValueError: if Variform cannot express it, or a tensor is missing or of another shape; names them.
    """
    form, foreign_class, our_class = (
        family.read_form(foreign, auto_class),
        family.foreign_class(auto_class),
        family.our_class(auto_class),
    )
    merges = merges_of(family, foreign, auto_class, stored)
    stored, read = merge(merges, stored, read)
    blueprint = Blueprint(foreign_class, foreign)
    present, unused = find_names(blueprint, stored, {"", family.prefix}, {"", family.prefix_of(auto_class)})
    resolved = blueprint.resolve(present, read)
    given = family.computed_tensors(foreign, auto_class, blueprint.specs)
    refuse_missing(foreign_class, [name for name in blueprint.specs if name not in resolved and name not in given])
    absent = {name: tensor for name, tensor in given.items() if name not in resolved}
    resolved |= {name: name for name in absent}
    moves, unmatched = plan(family.table(form, auto_class), resolved, outwards=False)
    taken = {resolved[name] for move in moves for name in move.sources}
    idle = {*family.idle_tensors(auto_class, unmatched), *family.heads[auto_class].unread}
    for name in unmatched:
        if resolved[name] in taken or name in absent:
            continue
        if name in idle:
            unused.append(resolved[name])
        else:
            check_computed(family, name, given, read(resolved[name]))

    ours = Blueprint(our_class, form)
    recipes, untied = gather(moves, resolved, ours)
    while untied and untie(form, untied):
        # The checkpoint knows better than its config: transformers does not tie tensors that differ either
        ours = Blueprint(our_class, form)
        recipes, untied = gather(moves, resolved, ours)
    if untied:
        raise ValueError(f"The checkpoint gives {shown(untied)} other values than the tensors that they are tied to.")
    specs = check_shapes(recipes, ours, {**absent, **stored})
    recipes = {name: recipe.after(merges) for name, recipe in recipes.items()}
    unused = [name for name in unused if not any(re.fullmatch(pattern, name) for pattern in family.ignored)]
    return Conversion(our_class, form, recipes, specs, absent, unused)


def outwards(
    family: Family, form: PreTrainedConfig, auto_class: str, stored: Mapping[str, torch.Tensor], read: Read
) -> Conversion:
    """How a Variform model becomes a foreign one; arguments and errors as in `inwards`."""
    foreign, foreign_class = family.write_config(form, auto_class), family.foreign_class(auto_class)
    blueprint, our_blueprint = Blueprint(foreign_class, foreign), Blueprint(family.our_class(auto_class), form)
    present, unused = find_names(our_blueprint, stored, {""}, {""})
    resolved = our_blueprint.resolve(present, read)
    refuse_missing(family.our_class(auto_class), [name for name in our_blueprint.specs if name not in resolved])
    moves, unmatched = plan(family.table(form, auto_class), resolved, outwards=True)
    if unmatched:
        raise ValueError(f"{foreign_class.__name__} has no place for {shown(unmatched)}.")
    written = {name for move in moves for name in move.targets}
    dtype = next(iter(stored.values())).dtype
    given = {
        name: tensor.to(dtype)
        for name, tensor in family.computed_tensors(foreign, auto_class, blueprint.specs).items()
        if name not in written
    }
    given |= {name: torch.zeros(blueprint.specs[name].shape, dtype=dtype) for name in family.heads[auto_class].unread}
    moves += [Move((name,), (name,), lambda tensors: tensors) for name in given]
    for name, read_instead in family.idle_tensors(auto_class, blueprint.specs).items():
        moves += [move._replace(targets=(name,)) for move in moves if move.targets == (read_instead,)]
    recipes, _ = gather(moves, {**resolved, **{name: name for name in given}}, blueprint)
    specs = check_shapes(recipes, blueprint, {**given, **stored})
    return Conversion(foreign_class, foreign, recipes, specs, given, unused)


def as_stored(conversion: Conversion, family: Family, auto_class: str) -> Conversion:
    """A conversion to a foreign class, with tensors as transformers stores them rather than as the class holds them."""
    moves, _ = plan(family.stored_table(conversion.config, auto_class), conversion.recipes, outwards=False)
    splits = {move.sources[0]: move for move in moves}
    recipes, specs = {}, {}
    for name, recipe in conversion.recipes.items():
        if name not in splits:
            recipes[name], specs[name] = recipe, conversion.specs[name]
            continue
        parts = splits[name].convert([conversion.specs[name]])
        for index, (part, spec) in enumerate(zip(splits[name].targets, parts, strict=True)):
            recipes[part], specs[part] = recipe.then(splits[name], index), spec
    return replace(conversion, recipes=recipes, specs=specs)


def merges_of(family: Family, foreign: PreTrainedConfig, auto_class: str, stored: Iterable[str]) -> dict[str, Move]:
    """{name: how it is made of stored tensors}, of those that transformers stores otherwise than its class holds them."""
    names = list(stored)
    moves, _ = plan(family.stored_table(foreign, auto_class), names, outwards=True)
    needed = {source for move in moves for source in move.sources}
    refuse_missing(family.foreign_class(auto_class), sorted(needed.difference(names)))
    return {move.targets[0]: move for move in moves}


def merge(
    merges: Mapping[str, Move], stored: Mapping[str, torch.Tensor], read: Read
) -> tuple[dict[str, torch.Tensor], Read]:
    """The specs of a checkpoint, and what reads its tensors, as if it held what `merges` make."""
    parts = {source for move in merges.values() for source in move.sources}
    specs = {name: spec for name, spec in stored.items() if name not in parts}
    for name, move in merges.items():
        try:
            (specs[name],) = move.convert([stored[source].to("meta") for source in move.sources])
        except RuntimeError as error:
            raise ValueError(f"{shown(list(move.sources))} do not go into one {name!r}: {error}") from error

    def read_merged(name: str) -> torch.Tensor:
        if name not in merges:
            return read(name)
        return merges[name].convert([read(source) for source in merges[name].sources])[0]

    return specs, read_merged


def find_names(
    blueprint: Blueprint, stored: Iterable[str], old_prefixes: Collection[str], new_prefixes: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """{name in the model: stored name}, and the stored names that the model does not have.

    A checkpoint of a base model has no prefix where one with a head has it; either is found under the other.
    """
    present, unused = {}, []
    for name in stored:
        stems = {name.removeprefix(old) for old in old_prefixes}
        known = next((new + stem for stem in stems for new in new_prefixes if new + stem in blueprint.specs), None)
        if name in blueprint.specs:
            known = name
        if known is None:
            unused.append(name)
        else:
            present[known] = name
    return present, unused


def gather(
    moves: Iterable[Move], resolved: Mapping[str, str], blueprint: Blueprint
) -> tuple[dict[str, Recipe], list[str]]:
    """{name: how it is made} for every tensor of a model, once for those that are tied; and the names that are tied there
    and would be made from different sources."""
    recipes: dict[str, Recipe] = {}
    untied = []
    for move in moves:
        sources = tuple(resolved[name] for name in move.sources)
        for index, name in enumerate(move.targets):
            if name not in blueprint.specs:
                raise ValueError(f"The name table leads to {name!r}, which the model does not have.")
            recipe, first = Recipe(sources, move.convert, index), blueprint.group[name][0]
            if first not in recipes:
                recipes[first] = recipe
            elif recipes[first].sources != sources:
                recipes[name] = recipe
                untied.append(name)
    missing = [name for name, names in blueprint.group.items() if names[0] not in recipes]
    if missing:
        raise ValueError(f"The name table leads to no {shown(missing)}.")
    return recipes, untied


def check_computed(family: Family, name: str, given: Mapping[str, torch.Tensor], tensor: torch.Tensor) -> None:
    """Refuses a stored tensor that no row takes, unless it holds what its class computes and ours does."""
    if name not in given:
        raise ValueError(f"{family.model_type}: the name table has no row for {name!r}.")
    # Half precision keeps 8 or 11 bits of a sine
    rounding = max(1e-5, torch.finfo(tensor.dtype).eps)
    if not torch.allclose(tensor.float(), given[name].float(), rtol=0, atol=rounding):
        raise ValueError(
            f"{family.model_type}: {name!r} does not hold the table that its class computes; it was changed."
        )


def check_shapes(
    recipes: Mapping[str, Recipe], blueprint: Blueprint, stored: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Runs all recipes without data; {name: a tensor of the shape and dtype that comes out}.

    Raises:
        ValueError: if a tensor comes out in another shape than the model's.
    """
    specs: dict[str, torch.Tensor] = {}
    results: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for name, recipe in recipes.items():
        if recipe.sources not in results:
            results[recipe.sources] = recipe.convert([stored[source].to("meta") for source in recipe.sources])
        made = results[recipe.sources][recipe.result]
        wanted = blueprint.specs[name].shape
        if made.shape != wanted:
            shapes = [f"{source!r} {tuple(stored[source].shape)}" for source in recipe.sources]
            raise ValueError(
                f"{listed(shapes)} gives {name!r} the shape {tuple(made.shape)}, but the config says {tuple(wanted)}."
            )
        specs[name] = made
    return specs


def untie(form: PreTrainedConfig, names: Iterable[str]) -> bool:
    """Turns off the tie that keeps these names from being tensors of their own; False if it is off already."""
    is_between_stacks = form.is_encoder_decoder and any("embed_tokens" in name for name in names)
    tie = "tie_encoder_decoder_embeddings" if is_between_stacks else "tie_word_embeddings"
    was_tied = getattr(form, tie)
    setattr(form, tie, False)
    return was_tied


def refuse_missing(model_class: type[PreTrainedModel], names: list[str]) -> None:
    """Raises `ValueError` if a checkpoint lacks tensors of its class."""
    if names:
        raise ValueError(
            f"The checkpoint lacks {shown(names)} of {model_class.__name__}; nothing is filled in. If it holds another "
            "head, or none, say so with `auto_class=`."
        )


def shown(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    return listed([repr(name) for name in names])


def listed(words: list[str]) -> str:
    """Some of the words, and how many more there are."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
