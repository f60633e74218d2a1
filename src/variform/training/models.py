"""The model and the tokenizer of a run: new, or taken over from a checkpoint, ours or one that converts; whole, or refused."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from ..conversion.convert import family_of, find_folder, from_hf, saved_architecture
from ..conversion.trust import check_folder, check_remote_code
from ..fields import TRAINING_FIELDS
from ..forms import FormLoader, config_from_dict, load_fields
from ..loading import load_strictly, read_config
from ..model.configuration_variform import AUTO_MAP, VariformEncoderDecoderConfig
from ..nearest import with_mend
from .lora import LoraArguments, load_adapter_strictly, lora_config
from .options import ModelArguments
from .tokenizer import byte_tokenizer


def load_tokenizer(options: ModelArguments, trained: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: that of a run that came to its end, the one that is named, or the one beside the model.

    Raises:
        ValueError: where there is none.
    """
    if trained is not None:
        return AutoTokenizer.from_pretrained(trained)
    if options.tokenizer == "bytes":
        return byte_tokenizer()
    source = options.tokenizer or options.model
    if source is None:
        raise ValueError(
            "A new model needs a `tokenizer`: a folder (finetune/tokenizer.py makes one), a repo, or `bytes`."
        )
    folder, gguf = split_gguf(source)
    revision = options.revision if source == options.model else None
    name = "tokenizer" if options.tokenizer else "model"
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision, **gguf)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if not Path(folder).is_dir():
            reason = f"there is no such folder, and no repo that can be reached ({reason.rstrip('.')})"
        elif not gguf and not Path(folder, "tokenizer.json").is_file():
            reason = "the folder holds no tokenizer.json; finetune/tokenizer.py makes one, and `tokenizer` names it"
        raise ValueError(f"`{name}={source}` has no tokenizer that loads: {reason.rstrip('.')}.") from error


def build_model(
    options: ModelArguments,
    auto_class: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lora: LoraArguments | None = None,
    trained: Path | None = None,
    on_meta: bool = False,
    **fields: Any,
) -> Any:
    """The model of a run, with float32 weights, in training mode; a PEFT model where `lora` asks for adapters.

    Args:
        options: the form or the checkpoint.
        auto_class: the Auto class of the head, such as `AutoModelForMaskedLM`.
        tokenizer: gives a new model its vocabulary and its special ids; one that goes on must have room for it.
        trained: the folder of a run that came to its end, to be read back instead.
        on_meta: build shapes alone, for a dry run.
        fields: of the config, such as `num_labels`; they win over the form's own.

    Raises:
        ValueError: for both or neither of a form and a model, a form of another shape than the head's, a checkpoint that lacks
            weights of the body, or a vocabulary too small for the tokenizer.
    """
    uses_lora = lora is not None and lora.use_peft
    if trained is not None and not uses_lora:
        return auto_class.from_pretrained(trained, attn_implementation=options.attn_implementation)
    if (options.form is None) == (options.model is None):
        got = "neither is given" if options.form is None else "not both"
        raise ValueError(f"Give `form`, to train a new model, or `model`, to go on from one: {got}.")
    if options.model is not None:
        check_changes(options.set)
        model: Any = load_model(options, auto_class, on_meta, fields)
        if options.set:
            model = change_training(model, options, auto_class, on_meta)
    else:
        config = make_config(options, tokenizer, fields)
        check_shape(config, auto_class, "form")
        model = from_form(config, auto_class, options.attn_implementation, on_meta)
    check_vocabulary(model.config, tokenizer)
    if uses_lora:
        if trained is not None:
            return load_adapter_strictly(model, trained, is_trainable=True)
        from peft import get_peft_model  # an extra

        model = get_peft_model(model, lora_config(model, lora))
    return model.train()


def make_config(
    options: ModelArguments, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
) -> PreTrainedConfig:
    """The config of a new model: the form, its changes, the tokenizer's vocabulary and ids, and then `fields`.

    A vocabulary that `set` asks for is taken; one of a form is that of another tokenizer.
    """
    form = read_form(options)
    asked = {change.partition("=")[0] for change in options.set}
    form.update(fields)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    form.update({name: index for name, index in ids.items() if index is not None})
    if form.get("model_type") == "variform_encoder_decoder":
        for stack in ("encoder", "decoder"):
            form[stack] = dict(form.get(stack, {}))
            if not asked & {"vocab_size", f"{stack}.vocab_size"}:
                form[stack]["vocab_size"] = len(tokenizer)
        start = ids["bos_token_id"] if ids["bos_token_id"] is not None else ids["pad_token_id"]
        form.setdefault("decoder_start_token_id", start)
    else:
        own = form["vocab_size"] if "vocab_size" in asked else len(tokenizer)
        form["vocab_size"] = fields.get("vocab_size", own)
    try:
        return config_from_dict(form)
    except ValueError as error:
        raise ValueError(with_mend(form, str(error))) from error


def read_form(options: ModelArguments) -> dict[str, Any]:
    """The fields of a new model as the recipe and the command line give them, `set` included.

    Raises:
        ValueError: for text that is neither a mapping nor a form's name nor a file, or a change without `=`.
    """
    text = str(options.form)
    form = dict(read_yaml("form", text)) if text.startswith("{") else load_fields(text)
    apply_changes(form, options.set)
    return form


def apply_changes(form: dict[str, Any], changes: list[str]) -> None:
    """Sets fields of a form as `set` gives them, FIELD=VALUE.

    Raises:
        ValueError: for a change without `=`, a value that is not YAML, or a stack that the form does not have.
    """
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"`set` takes FIELD=VALUE, got {change!r}.")
        *parents, name = path.split(".")
        for place in places(form, parents, name):
            place[name] = read_yaml("set", value)


def read_yaml(argument: str, text: str) -> Any:
    """A value that was given as YAML; ValueError, naming the argument, where it is none."""
    try:
        return yaml.load(text, FormLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"`{argument}`: {text!r} is not valid YAML: {getattr(error, 'problem', error)}.") from None


def places(form: dict[str, Any], parents: list[str], name: str) -> list[dict[str, Any]]:
    """The mappings of a form that a change of the field `name` goes into: of an encoder-decoder, both stacks or its own."""
    if form.get("model_type") == "variform_encoder_decoder":
        own = {item.name for item in dataclasses.fields(VariformEncoderDecoderConfig)}
        stacks = parents or ([] if name in own else ["encoder", "decoder"])
        for stack in stacks:
            form[stack] = dict(form.get(stack) or {})  # a recipe's stacks may be one mapping
        return [form[stack] for stack in stacks] or [form]
    if parents:
        raise ValueError(
            f"`set` {'.'.join([*parents, name])}: a {form.get('model_type')} has no stacks; write `{name}`."
        )
    return [form]


def from_form(config: PreTrainedConfig, auto_class: Any, attn_implementation: str | None, on_meta: bool) -> Any:
    with torch.device("meta" if on_meta else "cpu"):
        return auto_class.from_config(config, attn_implementation=attn_implementation)


def load_model(options: ModelArguments, auto_class: Any, on_meta: bool, fields: Mapping[str, Any]) -> PreTrainedModel:
    """The model to go on from, under the head that is asked for; a head that the checkpoint does not have is new."""
    check_remote_code(str(options.model), options.revision, options.trust_remote_code)
    path, gguf = split_gguf(str(options.model))
    loading: dict[str, Any] = {"attn_implementation": options.attn_implementation, "dtype": torch.float32}
    if gguf:
        if auto_class.__name__.endswith("LM"):
            return from_hf(path, auto_class=auto_class, **gguf, **loading)
        return with_head(from_hf(path, auto_class=AutoModel, **gguf, **loading), auto_class, options, fields)
    folder = find_folder(path, revision=options.revision)
    read_config(folder / CONFIG_NAME)
    check_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    is_ours = config.model_type in AUTO_MAP
    family = None if is_ours else family_of(config)
    saved = "" if family is None else family.auto_class_of(saved_architecture(config))
    if on_meta:
        form = config if family is None else family.read_form(config, saved)
        for name, value in fields.items():
            setattr(form, name, value)
        check_shape(form, auto_class, "model")
        return from_form(form, auto_class, options.attn_implementation, on_meta)
    if is_ours:
        check_shape(config, auto_class, "model")
        # A head of another size, for other labels, is as good as none
        return load_strictly(
            auto_class, folder, new_head=True, allow_missing=options.allow_missing, **loading, **fields
        )
    if saved == auto_class.__name__ and len(fields.get("id2label", config.id2label)) == config.num_labels:
        model = from_hf(folder, auto_class=auto_class, **loading)
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model
    return with_head(from_hf(folder, **loading), auto_class, options, fields)


def check_changes(changes: list[str]) -> None:
    """Raises ValueError for a change of a trained model that would need other weights, or give them another meaning."""
    for change in changes:
        name = change.partition("=")[0].split(".")[-1]
        if name not in TRAINING_FIELDS:
            raise ValueError(
                f"`set` {change}: of a trained model it changes what only training reads ({', '.join(TRAINING_FIELDS)}); "
                "its form is changed by `variform surgery`."
            )


def change_training(model: Any, options: ModelArguments, auto_class: Any, on_meta: bool) -> Any:
    """The same weights in a model whose dropout and losses are those that `set` gives."""
    form = model.config.to_dict()
    apply_changes(form, options.set)
    changed = from_form(type(model.config).from_dict(form), auto_class, options.attn_implementation, on_meta)
    if not on_meta:
        changed.load_state_dict(model.state_dict())
    if model.can_generate():
        changed.generation_config = model.generation_config
    return changed


def with_head(source: PreTrainedModel, auto_class: Any, options: ModelArguments, fields: Mapping[str, Any]) -> Any:
    """A model with a new head over the body of another."""
    for name, value in fields.items():
        setattr(source.config, name, value)
    check_shape(source.config, auto_class, "model")
    model = auto_class.from_config(source.config, attn_implementation=options.attn_implementation)
    # The engine has filled in nothing: what is missing here is the head's pooler at most
    model.base_model.load_state_dict(source.base_model.state_dict(), strict=False)
    return model


def load_teacher(source: str, auto_class: Any) -> PreTrainedModel:
    """A checkpoint with the head that is asked for, whole: a head that started at random would teach nothing.

    Args:
        source: a folder or repo, of ours or of a model that converts; or the path of a GGUF file.
        auto_class: the Auto class of the head.

    Raises:
        ValueError: for a checkpoint without this head, or that lacks anything else.
    """
    path, gguf = split_gguf(source)
    folder = find_folder(path)
    config = None if gguf else AutoConfig.from_pretrained(folder)
    if config is None or config.model_type not in AUTO_MAP:
        return from_hf(path, auto_class=auto_class, dtype=torch.float32, **gguf)
    check_shape(config, auto_class, "teacher")
    return load_strictly(auto_class, folder, dtype=torch.float32)


def check_same_tokens(source: str | None, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ValueError where the tokenizer beside a model, if there is one, has other tokens than `tokenizer`.

    Args:
        source: the model, as the argument `name` gives it.
    """
    if source is None or (Path(source).is_dir() and not any(Path(source).glob("tokenizer*"))):
        return
    if load_tokenizer(ModelArguments(model=source)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"`{name}={source}` reads other tokens than the tokenizer of this run: teacher and student must read the same."
        )


def check_shape(config: PreTrainedConfig, auto_class: Any, name: str) -> None:
    """Raises ValueError for a form that has no such head."""
    if auto_class.__name__ not in AUTO_MAP[config.model_type]:
        fitting = [model_type for model_type, classes in AUTO_MAP.items() if auto_class.__name__ in classes]
        raise ValueError(f"`{name}` is a {config.model_type}; this script trains one of: {', '.join(fitting)}.")


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no vector for."""
    size = min(getattr(config, stack, config).vocab_size for stack in ("encoder", "decoder"))
    if len(tokenizer) > size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens, the model's `vocab_size` is {size}: call "
            "`resize_token_embeddings` on the model and save it, or take the tokenizer that belongs to it."
        )


def labels_of(names: list[str]) -> dict[str, Any]:
    """The names of classes, by their numbers, as fields of a config."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def check_length(config: PreTrainedConfig, length: int, name: str = "max_length", *, stack: str = "decoder") -> None:
    """Raises ValueError where sequences are longer than a table of learned positions.

    Args:
        length: tokens of the longest sequence, as the argument `name` gives it.
        stack: of an encoder-decoder, which one is fed.
    """
    form = getattr(config, stack, config)
    if form.position_embedding_type == "learned" and length > form.max_position_embeddings:
        raise ValueError(
            f"`{name}={length}` exceeds the model's table of {form.max_position_embeddings} learned positions "
            "(`max_position_embeddings`): shorten the sequences, or lengthen the table with `variform surgery sparsify`."
        )


def split_gguf(source: str) -> tuple[str, dict[str, Any]]:
    """A path that names a GGUF file as folder and `gguf_file`, the arguments of `from_pretrained`."""
    path = Path(source)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})


def form_of(options: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """What a card says of the form: the fields that were asked for or, of a model that goes on, all but the defaults."""
    return read_form(options) if options.form is not None else json.loads(config.to_json_string())
