"""What a family file says, and the two directions of its config map."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..fields import TRAINING_FIELDS
from ..model import configuration_variform, modeling_variform
from ..model.configuration_variform import AUTO_MAP
from .compare import NOT_FORM, comparable, is_same
from .tables import Row, as_pattern

logger = logging.get_logger(__name__)

# Fields of every config, called the same everywhere
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
PLATFORM_FIELDS = ("id2label", "label2id", "problem_type", "dtype", "use_cache")
# What a foreign config holds besides its form
BOOKKEEPING = frozenset(
    [
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "is_encoder_decoder",
        "_attn_implementation",
        "_attn_implementation_internal",
    ]
)
# Ours that change how a model is trained, and nothing that it computes afterwards
NOT_COMPUTED = frozenset([*TRAINING_FIELDS, "initializer_range", "use_cache"])
# Ours that may be given as whole numbers
REAL_FIELDS = frozenset(
    f.name for f in fields(configuration_variform.VariformStackConfig) if float in get_args(f.type)
)
LANGUAGE_MODELS = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
POOLED = ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")
CLASSIFIERS = (*POOLED, "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
# Which heads read a field that not all of them read
READERS = {
    **dict.fromkeys(("lm_head_transform", "lm_head_bias", "logit_scale", "final_logit_softcapping"), LANGUAGE_MODELS),
    **dict.fromkeys(("head_act", "head_bias"), LANGUAGE_MODELS + CLASSIFIERS),
    **dict.fromkeys(("pooler", "pooler_act"), ("AutoModel", *POOLED)),
    **dict.fromkeys(("classifier_bias", "classifier_pooling"), POOLED),
    "classifier_transform": CLASSIFIERS,
    "tie_word_embeddings": LANGUAGE_MODELS,
}


@dataclass(frozen=True)
class Head:
    """One foreign class of a family.

    Args:
        foreign: its name in transformers.
        rows: the names of the head's own tensors, in full on both sides.
        prefix: what stands before the names of the base model's tensors; default: the family's.
        fixed: fields of ours that are so under this head.
        read: the foreign config -> fields of ours that it decides under this head alone.
        unread: names of tensors that this class holds and never reads, and that ours has no place for: they come in as
            unused and go out as zeros.
        differs: what this class does and ours does not, said in a warning when it comes in.
    """

    foreign: str
    rows: Sequence[Row] = ()
    prefix: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[PreTrainedConfig], dict[str, Any]] = lambda foreign: {}
    unread: Sequence[str] = ()
    differs: str = ""


@dataclass(frozen=True)
class Family:
    """A foreign family: a config map and a name table.

    Fields of ours are written with the stack before a dot in an encoder-decoder: `encoder.hidden_size`.

    Args:
        model_type: as transformers calls the family.
        shape: the `model_type` of ours.
        takes: which configs of the family are of this shape, where it has several.
        same: {our field: foreign field} where the values are equal.
        fixed: our fields that the foreign class has built in.
        read: the foreign config -> our other fields.
        write: our config -> the foreign fields that `same` does not give. What `read` makes of them is compared with
            the form: a form that does not come back is refused, so `write` need not check anything.
        by_weights: our fields that the tensors decide, not the foreign config.
        inert: foreign fields that change nothing that the class computes.
        in_training: foreign fields that only training reads and that may get lost.
        rows: the form -> the name table of the base model, without prefixes.
        prefix: what a headed class puts before the names of the base model's tensors.
        heads: {Auto class: the foreign class}.
        computed: {template of a foreign name: the foreign config -> what the tensor must hold}.
        idle: {foreign name: the one it is tied to}, of tensors that nothing reads where they are not tied: they come in
            as unused and go out as copies.
        ignored: patterns of tensors that old checkpoints carry and nothing reads.
        stored: the foreign config -> rows from the base model's tensors to those in a checkpoint (as `ours`), where
            transformers stores them otherwise than its class holds them.
    """

    model_type: str
    shape: str
    same: Mapping[str, str]
    fixed: Mapping[str, Any]
    rows: Callable[[PreTrainedConfig], Sequence[Row]]
    prefix: str
    heads: Mapping[str, Head]
    takes: Callable[[PreTrainedConfig], bool] = lambda foreign: True
    read: Callable[[PreTrainedConfig], dict[str, Any]] = lambda foreign: {}
    write: Callable[[PreTrainedConfig], dict[str, Any]] = lambda form: {}
    by_weights: Sequence[str] = ()
    inert: frozenset[str] = frozenset()
    in_training: frozenset[str] = frozenset()
    computed: Mapping[str, Callable[[PreTrainedConfig], torch.Tensor]] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    stored: Callable[[PreTrainedConfig], Sequence[Row]] = lambda foreign: ()

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return transformers.CONFIG_MAPPING[self.model_type]

    def prefix_of(self, auto_class: str) -> str:
        """What a class puts before the names of the base model's tensors."""
        if auto_class == "AutoModel":
            return ""
        prefix = self.heads[auto_class].prefix
        return self.prefix if prefix is None else prefix

    def table(self, form: PreTrainedConfig, auto_class: str) -> list[Row]:
        """All rows of one class, with the prefixes of its base model's names."""
        ours = "" if auto_class == "AutoModel" else "model."
        base = [row.prefixed(self.prefix_of(auto_class), ours) for row in self.rows(form)]
        return [*self.heads[auto_class].rows, *base]

    def stored_table(self, foreign: PreTrainedConfig, auto_class: str) -> list[Row]:
        """The rows of `stored`, under each prefix that a checkpoint may have."""
        prefixes = dict.fromkeys((self.prefix_of(auto_class), self.prefix, ""))
        return [row.prefixed(prefix, prefix) for prefix in prefixes for row in self.stored(foreign)]

    def computed_tensors(
        self, foreign: PreTrainedConfig, auto_class: str, names: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """{name: what it must hold}, of those tensors among `names` that the foreign class computes."""
        prefix = self.prefix_of(auto_class)
        patterns = [(re.compile(as_pattern(template)), make) for template, make in self.computed.items()]
        return {
            name: make(foreign)
            for name in names
            for pattern, make in patterns
            if pattern.fullmatch(name.removeprefix(prefix))
        }

    def idle_tensors(self, auto_class: str, names: Iterable[str]) -> dict[str, str]:
        """{name: the tensor that is copied into it}, of those among `names` that the foreign class never reads."""
        prefixes = {"", self.prefix_of(auto_class)}
        idle = {prefix + name: prefix + read for name, read in self.idle.items() for prefix in prefixes}
        return {name: idle[name] for name in names if name in idle}

    def foreign_class(self, auto_class: str) -> type[PreTrainedModel]:
        return getattr(transformers, self.heads[auto_class].foreign)

    def our_class(self, auto_class: str) -> type[PreTrainedModel]:
        return getattr(modeling_variform, AUTO_MAP[self.shape][auto_class].split(".")[1])

    def auto_class_of(self, architecture: str, asked: Any = None) -> str:
        """The Auto class of a foreign class, by its name; or the one that is asked for.

        Raises:
            ValueError: if the class is not known, or the family has no such head.
        """
        known = {head.foreign: auto_class for auto_class, head in self.heads.items()}
        name: str | None = known.get(architecture)
        if asked is not None:
            name = getattr(asked, "__name__", str(asked))
        if name is not None and name in self.heads:
            return name
        asked_for = f"`auto_class={name}`" if asked is not None else f"the class {architecture!r}"
        raise ValueError(
            f"{asked_for} has no counterpart: of {self.model_type}, Variform has {', '.join(sorted(known))}. Name one "
            f"with `auto_class=`, of {', '.join(self.heads)}; what the others hold is then left behind."
        )

    def read_form(self, foreign: PreTrainedConfig, auto_class: str) -> PreTrainedConfig:
        """The form of a foreign config under a head, with what no field of ours decides in `origin`.

        Raises:
            ValueError: for a feature that Variform does not have, naming the foreign field.
        """
        form, head = self._read(foreign, auto_class), self.heads[auto_class]
        copy_platform_fields(foreign, form, decided=self.read(foreign))
        form.origin = {"model_type": self.model_type, **self._left_over(foreign, form)}
        if head.differs:
            logger.warning(f"{head.foreign} {head.differs}")
        return form

    def _read(self, foreign: PreTrainedConfig, auto_class: str) -> PreTrainedConfig:
        head = self.heads[auto_class]
        values = {ours: getattr(foreign, name) for ours, name in self.same.items()}
        values |= {**self.fixed, **self.read(foreign), **head.fixed, **head.read(foreign)}
        values |= {name: getattr(foreign, name, None) for name in SPECIAL_IDS}
        return build_form(self.shape, values)

    def _left_over(self, foreign: PreTrainedConfig, form: PreTrainedConfig) -> dict[str, Any]:
        """Fields of a foreign config that its form does not give back, all of them harmless."""
        back = self._written(form).to_dict()
        left = {
            name: value
            for name, value in foreign.to_dict().items()
            if name not in BOOKKEEPING and (name not in back or back[name] != value)
        }
        declared = {f.name for f in fields(self.config_class)}
        for name, value in left.items():
            if name in self.in_training:
                logger.warning(
                    f"{self.model_type}: `{name}={value!r}`, which matters in training only, is not carried over."
                )
            elif name in declared - self.inert - NOT_FORM and value is not None:
                raise ValueError(
                    f"{self.model_type}: Variform does not carry `{name}={value!r}`, only {back.get(name)!r}."
                )
        return left

    def write_config(self, form: PreTrainedConfig, auto_class: str) -> PreTrainedConfig:
        """The foreign config of a form under a head.

        Raises:
            ValueError: if the family cannot express the form, naming the field.
        """
        try:
            foreign = self._written(form)
            differences = self._differences(form, foreign, auto_class)
        except (ValueError, StrictDataclassError) as error:
            # No config of the foreign class comes near
            raise ValueError(f"{self.model_type} cannot express this form: {error}") from error
        self._check_expressed(form, differences, auto_class)
        origin = dict(form.origin or {})
        if origin.pop("model_type", None) == self.model_type:
            # What the form has not decided since stays as it was: all of it or, where that no longer fits, one by one
            for values in (origin, *({name: value} for name, value in origin.items())):
                kept = self._written(form, **values)
                if self._differences(form, kept, auto_class) == differences:
                    for name, value in values.items():
                        setattr(foreign, name, value)
        foreign.architectures = [self.heads[auto_class].foreign]
        return foreign

    def _written(self, form: PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
        values: dict[str, Any] = {}
        for ours, name in self.same.items():
            values.setdefault(name, plain_value(form, ours))
        values |= {name: getattr(form, name) for name in SPECIAL_IDS}
        foreign = self.config_class(**copy.deepcopy(values | self.write(form) | overrides))
        copy_platform_fields(form, foreign)
        return foreign

    def _differences(self, form: PreTrainedConfig, foreign: PreTrainedConfig, auto_class: str) -> dict[str, Any]:
        """{our field: what the foreign class has instead}, among the fields that this head reads."""
        back, wanted = comparable(self._read(foreign, auto_class)), comparable(form)
        # First what both have: a field that is read on one side only is so because of another
        return {
            name: back.get(name)
            for name, value in sorted(wanted.items(), key=lambda item: item[0] not in back)
            if not is_same(back.get(name), value)
            and name not in self.by_weights
            and auto_class in READERS.get(name.rpartition(".")[2], (auto_class,))
        }

    def _check_expressed(self, form: PreTrainedConfig, differences: Mapping[str, Any], auto_class: str) -> None:
        values = comparable(form)
        for name, value in differences.items():
            wanted = values[name]
            if name.rpartition(".")[2] in NOT_COMPUTED:
                logger.warning(
                    f"{self.model_type} has no `{name}={wanted!r}`: it computes the same, and trains without."
                )
                continue
            raise ValueError(
                f"{self.model_type} cannot express `{name}={wanted!r}`: its {self.heads[auto_class].foreign} has {value!r}."
            )


def build_form(shape: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a shape from its fields, those of a stack after `encoder.` or `decoder.`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        stack, _, inner = name.rpartition(".")
        (nested.setdefault(stack, {}) if stack else nested)[inner] = value
    return getattr(configuration_variform, AUTO_MAP[shape]["AutoConfig"].split(".")[1])(**nested)


def get_field(form: PreTrainedConfig, name: str) -> Any:
    """The value of a field, which may be one of a stack: `decoder.hidden_size`."""
    for part in name.split("."):
        form = getattr(form, part)
    return form


def plain_value(form: PreTrainedConfig, name: str) -> Any:
    """The value of a field in the type that foreign configs insist on; where there is none, the nearest, which is refused when
    it is compared."""
    value = get_field(form, name)
    if isinstance(value, list):
        return {*value} == {*"qkvo"}  # biases on some projections
    is_real = name.rpartition(".")[2] in REAL_FIELDS
    return float(value) if is_real and value is not None else value


def patterns(foreign: PreTrainedConfig) -> list[str]:
    """Our patterns of a foreign config with `layer_types` and one `sliding_window`, without repeats."""
    names = {"full_attention": "full", "sliding_attention": f"sliding_window:{foreign.sliding_window}"}
    return without_repeats([names[layer_type] for layer_type in foreign.layer_types])


def without_repeats(layers: list[str]) -> list[str]:
    """The shortest list that, tiled over the layers, gives these."""
    return next(layers[:n] for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)])


def windows(form: PreTrainedConfig) -> tuple[list[str], int | None]:
    """A foreign config's `layer_types`, and its one window or None, from our patterns.

    Of several windows the widest, and for what is no window the nearest: both are refused when they are compared.
    """
    kept = [form.pattern_of(layer).retained(is_causal=True) for layer in range(form.num_hidden_layers)]
    types = ["full_attention" if number is None else "sliding_attention" for number in kept]
    return types, max((number for number in kept if number is not None), default=None)


def ropes(foreign: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters of a class that turns whole heads: it passes over `partial_rotary_factor`, which ours heeds.

    The "proportional" rope alone reads it, and turns whole heads with it.
    """

    def whole(parameters: dict[str, Any]) -> dict[str, Any]:
        if all(isinstance(value, dict) for value in parameters.values()):
            return {layer_type: whole(inner) for layer_type, inner in parameters.items()}
        is_read = parameters.get("rope_type") == "proportional"
        return {name: value for name, value in parameters.items() if is_read or name != "partial_rotary_factor"}

    return whole(foreign.rope_parameters)


def copy_platform_fields(source: PreTrainedConfig, target: PreTrainedConfig, decided: Collection[str] = ()) -> None:
    """Labels, problem type, dtype and `use_cache`: what all configs share, but for what is decided otherwise."""
    for name in PLATFORM_FIELDS:
        if name not in decided and hasattr(source, name) and hasattr(target, name):
            setattr(target, name, copy.deepcopy(getattr(source, name)))
