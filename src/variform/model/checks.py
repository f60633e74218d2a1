"""What no config may say: each check refuses a value, or a combination, naming the field, the value and the mend."""

import difflib
import math
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .patterns import parse
from .sparse_patterns import Lsh

# What a field takes that is a number, whole or not
Number = int | float

# Keys that the platform itself puts into a config.json or passes to a config, besides generation names and `_private` ones.
PLATFORM_KEYS = frozenset(
    [
        "model_type",
        "auto_map",
        "architectures",
        "transformers_version",
        "transformers_weights",
        "name_or_path",
        "num_labels",
        "torch_dtype",
        "output_attentions",
        "output_router_logits",
        "attn_implementation",
        "experts_implementation",
        "per_layer_config",
        "quantization_config",
        "compression_config",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "tie_last_hidden_states",
        "tokenizer_class",
        "task_specific_params",
        "finetuning_task",
        "adapters",
        "base_model_name_or_path",
    ]
)


def refuse(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` if `condition` holds: a message names the field, the value and the mend."""
    if condition:
        raise ValueError(message)


def one_of(name: str, value: Any, allowed: Any) -> None:
    """Refuses `value` unless it is among `allowed`, listing the choices and the nearest one."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}={value!r}` is not one of {sorted(map(str, allowed))}.{hint}")


def checked(config_class: Any) -> Any:
    """transformers' `strict` for a config class, whose type errors become `ValueError`s of one sentence."""
    config_class = strict(config_class)
    assign = config_class.__setattr__

    def assign_checked(self, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError as error:
            if isinstance(value, str):
                one_of(name, value, choices.get(name) or [value])
            raise ValueError(f"`{name}={value!r}` has a wrong type: {error.__cause__}.") from error

    choices = {field.name: words_of(field.type) for field in fields(config_class)}
    config_class.__setattr__ = assign_checked
    return config_class


def words_of(annotation: Any) -> list[str]:
    """The words that a field takes where it takes nothing else: `Literal["a", "b"] | None` -> `["a", "b"]`."""
    is_union = get_origin(annotation) in (Union, UnionType)
    parts = [part for part in (get_args(annotation) if is_union else [annotation]) if part is not type(None)]
    is_closed = all(get_origin(part) is Literal for part in parts)
    return [word for part in parts for word in get_args(part)] if is_closed else []


def check_keys(config: Any, keys: dict[str, Any], version: str) -> None:
    """Refuses a key that is neither a field nor known to the platform, naming the nearest field.

    Args: version: ours; a config that a newer one saved may have fields that we do not know.
    """
    known = {f.name for f in fields(config)} | PLATFORM_KEYS
    known |= set(GenerationConfig._get_default_generation_params())
    for key in keys:
        if key in known or key.startswith("_"):
            continue
        refuse(
            key.startswith("cross_att") and "pattern" in key,
            f"`{key}` is not a field: cross-attention is always full, and `attention_patterns` of the encoder and of the "
            "decoder shape how each attends to itself; leave it out.",
        )
        newer = config.variform_version is not None and version_tuple(config.variform_version) > version_tuple(version)
        if newer:
            raise ValueError(
                f"`{key}` is not a field of {type(config).__name__} in Variform {version}; this config was saved by "
                f"{config.variform_version}: `pip install 'variform>={config.variform_version}'`."
            )
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f"did you mean `{near[0]}`?" if near else "see the class docstring for the fields."
        raise ValueError(f"`{key}` is not a field of {type(config).__name__}; {hint}")


def version_tuple(version: str) -> tuple[int, ...]:
    """`"0.12.1"` -> `(0, 12, 1)`; what is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def check_sizes(config: Any) -> None:
    """Sizes as they are given, before the others are derived from them."""
    for field in fields(config):
        value = getattr(config, field.name)
        refuse(
            isinstance(value, float) and not math.isfinite(value), f"`{field.name}={value}` must be a finite number."
        )
    counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in counts:
        refuse(getattr(config, name) < 1, f"`{name}={getattr(config, name)}` must be at least 1.")
    for name in ("intermediate_size", "head_dim", "num_key_value_heads", "embedding_size", "num_hidden_groups"):
        value = getattr(config, name)
        refuse(value is not None and value < 1, f"`{name}={value}` must be at least 1, or unset to derive it.")
    refuse(config.type_vocab_size < 0, f"`type_vocab_size={config.type_vocab_size}` must be 0 (none) or more.")
    refuse(config.position_offset < 0, f"`position_offset={config.position_offset}` must be 0 or more.")
    refuse(
        config.head_dim is None and config.hidden_size % config.num_attention_heads != 0,
        f"`hidden_size={config.hidden_size}` is not a multiple of `num_attention_heads={config.num_attention_heads}`; "
        "set `head_dim` to choose the width of a head freely.",
    )


def check_memory(config: Any) -> None:
    """The memory of a decoder; before transformers reads `layer_types`, which follow from it."""
    refuse(config.memory_length < 0, f"`memory_length={config.memory_length}` must be 0 (none) or more.")
    refuse(
        config.memory_length > 0 and not config.is_causal_stack,
        f"`memory_length={config.memory_length}` is for decoders: an encoder's tokens see both ways, so that a text cannot "
        "be read in pieces; drop it.",
    )
    by_layer_type = any(isinstance(value, dict) for value in (config.rope_parameters or {}).values())
    refuse(
        config.memory_length > 0 and by_layer_type,
        f"`memory_length={config.memory_length}` makes all layers of one type for their caches, and `rope_parameters` tells "
        "them apart by type; give one dict for all.",
    )


def check_choices(config: Any) -> None:
    """Values that are right or wrong by themselves."""
    for name in ("hidden_act", "pooler_act"):
        one_of(name, getattr(config, name), list(ACT2FN))
    one_of("head_act", config.head_act, [None, *ACT2FN])
    dropouts = [f"{name}_dropout" for name in ("hidden", "attention", "activation", "classifier")]
    for name in (*dropouts, "layerdrop", "label_smoothing"):
        value = getattr(config, name)
        refuse(not 0 <= value < 1, f"`{name}={value}` is a probability: it must lie in [0, 1).")
    refuse(config.z_loss_coef < 0, f"`z_loss_coef={config.z_loss_coef}` must be 0 (off) or more.")
    refuse(config.norm_eps <= 0, f"`norm_eps={config.norm_eps}` must be above 0.")
    refuse(config.initializer_range < 0, f"`initializer_range={config.initializer_range}` must be 0 or more.")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_scale", "glu_limit"):
        value = getattr(config, name)
        refuse(value is not None and value <= 0, f"`{name}={value}` must be above 0, or null to leave it out.")
    if not isinstance(config.attention_bias, bool):
        for projection in config.attention_bias:
            one_of("attention_bias", projection, ["q", "k", "v", "o"])
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for name, ids in (("pad", [config.pad_token_id]), ("bos", [config.bos_token_id]), ("eos", eos_ids)):
        for token_id in ids:
            refuse(
                token_id is not None and not 0 <= token_id < config.vocab_size,
                f"`{name}_token_id={token_id}` is outside the vocabulary: `vocab_size={config.vocab_size}`.",
            )


def check_combinations(config: Any) -> None:
    """Fields that contradict each other."""
    refuse(
        config.num_attention_heads % config.num_key_value_heads != 0,
        f"`num_key_value_heads={config.num_key_value_heads}` does not divide "
        f"`num_attention_heads={config.num_attention_heads}`.",
    )
    check_groups(config)
    refuse(
        config.norm_unit_offset and config.norm_type != "rms_norm",
        f"`norm_unit_offset=True` is a form of rms_norm, got `norm_type={config.norm_type!r}`; drop one of them.",
    )
    refuse(
        config.parallel_residual and config.norm_placement != "pre",
        f"`parallel_residual=True` needs `norm_placement='pre'`, got {config.norm_placement!r}.",
    )
    refuse(
        config.skip_first_norm and config.norm_placement not in ("pre", "sandwich"),
        f"`skip_first_norm=True` leaves out a norm that `norm_placement={config.norm_placement!r}` does not have.",
    )
    check_streams(config)
    check_gates(config)
    for entry in config.attention_patterns:
        parse(entry).check(config.is_causal_stack, config.max_position_embeddings, config.num_attention_heads)
    check_sorting(config)
    refuse(
        config.is_causal_stack and config.pooler,
        "`pooler=True` is for encoders; drop it, or set `classifier_transform=True` for a dense layer before the labels.",
    )
    if config.position_embedding_type == "rope":
        check_rope(config)
    if config.position_embedding_type == "sinusoidal":
        refuse(
            config.embedding_size % 2 != 0 or config.embedding_size < 4,
            f"`position_embedding_type='sinusoidal'` needs an even embedding width of at least 4, got "
            f"{config.embedding_size}.",
        )
    if config.position_embedding_type == "axial":
        check_axes(config)
    if config.position_embedding_type == "relative_bias":
        check_buckets(config)
    refuse(
        config.position_embedding_type == "transformer_xl" and config.hidden_size % 2 != 0,
        f"`hidden_size={config.hidden_size}` is odd, and `position_embedding_type='transformer_xl'` has a sine and a cosine "
        "of each frequency; choose an even one.",
    )


def check_streams(config: Any) -> None:
    """Two residual streams, and what does not go with them."""
    streams = f"`residual_streams={config.residual_streams}`"
    refuse(config.residual_streams not in (1, 2), f"{streams} must be 1 or 2.")
    if config.residual_streams == 1:
        return
    refuse(config.norm_placement != "pre", f"{streams} needs `norm_placement='pre'`, got {config.norm_placement!r}.")
    refuse(
        config.parallel_residual,
        f"{streams} lets the feed-forward read what attention has added to, and `parallel_residual=True` what it has not; "
        "drop one of them.",
    )
    refuse(
        config.tie_word_embeddings,
        f"{streams} gives the language-model head states of {config.output_size}, {config.residual_streams} times as wide as "
        "a layer: set `tie_word_embeddings=False`.",
    )


def check_gates(config: Any) -> None:
    """What is done to the two factors of a gated feed-forward."""
    for name, off in (("glu_limit", None), ("glu_offset", 0)):
        value = getattr(config, name)
        refuse(
            not config.gated_mlp and value != off,
            f"`{name}={value}` is for the two factors of a gated feed-forward; set `gated_mlp=True`, or leave it {off}.",
        )


def check_sorting(config: Any) -> None:
    """Patterns that sort whole texts, which nothing can hold in part."""
    if not (config.is_causal_stack and config.sorts_texts):
        return
    entry = next(str(p) for p in map(parse, config.attention_patterns) if isinstance(p, Lsh) and p.chunked)
    refuse(
        config.use_cache,
        f"`use_cache=True`: `attention_patterns` entry '{entry}' sorts the whole text anew with each token, which no cache "
        "holds; set it to False, or use `chunked=false`.",
    )
    refuse(
        config.memory_length > 0,
        f"`memory_length={config.memory_length}`: `attention_patterns` entry '{entry}' sorts whole texts, of which a memory "
        "holds a part; drop it, or use `chunked=false`.",
    )


def check_groups(config: Any) -> None:
    """Layers that share weights."""
    groups = config.num_hidden_groups or config.num_hidden_layers
    refuse(
        config.num_hidden_layers % groups != 0,
        f"`num_hidden_groups={groups}` does not divide `num_hidden_layers={config.num_hidden_layers}`.",
    )
    size = config.num_hidden_layers // groups
    entries = [config.attention_patterns[i % len(config.attention_patterns)] for i in range(config.num_hidden_layers)]
    refuse(
        differ_within_groups(config, entries),
        f"`num_hidden_groups={groups}` makes layers share weights that `attention_patterns` gives different patterns; "
        "give one pattern to each group.",
    )
    refuse(
        config.skip_first_norm and size > 1,
        f"`skip_first_norm=True` would leave the norm out of {size} layers that share weights "
        f"(`num_hidden_groups={groups}`); drop one of them.",
    )


def differ_within_groups(config: Any, of_layers: list[Any]) -> bool:
    """Whether layers that share weights have different ones of the values, of which each layer has one."""
    size = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
    return any(value != of_layers[i // size * size] for i, value in enumerate(of_layers))


def check_rope(config: Any) -> None:
    """The parameters of each layer type's rotation."""
    for layer_type in set(config.layer_types):
        parameters = config.rope_parameters_of(layer_type) or {}
        rope_type = parameters.get("rope_type", "default")
        one_of("rope_parameters['rope_type']", rope_type, ["default", *ROPE_INIT_FUNCTIONS])
        theta = parameters.get("rope_theta")
        refuse(
            not isinstance(theta, (int, float)) or not 0 < theta < math.inf,
            f"`rope_parameters['rope_theta']={theta}` must be a finite number above 0.",
        )
        rotated = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        refuse(
            rotated < 2 or rotated % 2 != 0 or rotated > config.head_dim,
            f"`position_embedding_type='rope'` rotates pairs: `head_dim={config.head_dim}` times `partial_rotary_factor="
            f"{parameters.get('partial_rotary_factor', 1.0)}` gives {rotated}; choose an even number.",
        )
        refuse(
            rope_type == "dynamic" and rotated == 2,
            "`rope_parameters['rope_type']='dynamic'` has no scale for a single pair; rotate 4 channels or more.",
        )
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(error.args[0]) from error


def check_axes(config: Any) -> None:
    """The two tables of axial positions."""
    for name in ("axial_shape", "axial_dims"):
        axes = getattr(config, name)
        refuse(len(axes) != 2 or min(axes) < 1, f"`{name}={axes}` must be two numbers from 1 on.")
    refuse(
        math.prod(config.axial_shape) < config.max_position_embeddings,
        f"`axial_shape={config.axial_shape}` holds {math.prod(config.axial_shape)} positions, fewer than "
        f"`max_position_embeddings={config.max_position_embeddings}`; choose larger tables, or unset it to derive it.",
    )
    refuse(
        sum(config.axial_dims) != config.embedding_size,
        f"`axial_dims={config.axial_dims}` must add up to `embedding_size={config.embedding_size}`; unset it to derive it.",
    )


def check_buckets(config: Any) -> None:
    """The buckets of relative positions."""
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    exact = buckets // (2 if config.is_causal_stack else 4)
    refuse(
        exact < 1 or (not config.is_causal_stack and buckets % 2 != 0),
        f"`relative_attention_num_buckets={buckets}` is too small or odd: causal stacks need 2 or more, "
        "bidirectional ones an even number from 4.",
    )
    refuse(
        distance <= exact,
        f"`relative_attention_max_distance={distance}` must be above {exact}, the distances that "
        f"`relative_attention_num_buckets={buckets}` tells apart one by one.",
    )


def check_pair(config: Any) -> None:
    """What an encoder-decoder's own fields, and those of its stacks together, may be."""
    smoothing = config.label_smoothing
    refuse(not 0 <= smoothing < 1, f"`label_smoothing={smoothing}` is a probability: it must lie in [0, 1).")
    for name in ("z_loss_coef", "router_aux_loss_coef", "router_z_loss_coef"):
        value = getattr(config, name)
        refuse(value < 0, f"`{name}={value}` must be 0 (off) or more.")
    refuse(
        config.use_cache and config.decoder.sorts_texts,
        "`use_cache=True`: the decoder's `attention_patterns` sort the whole text anew with each token, which no cache "
        "holds; set it to False, or use `chunked=false`.",
    )
    refuse(
        config.decoder.residual_streams != 1,
        f"`decoder.residual_streams={config.decoder.residual_streams}` leaves open which stream attends to the encoder; "
        "use 1.",
    )
    start = config.decoder_start_token_id
    refuse(
        start is not None and not 0 <= start < config.decoder.vocab_size,
        f"`decoder_start_token_id={start}` is outside the vocabulary: `decoder.vocab_size={config.decoder.vocab_size}`.",
    )
    shapes = [(stack.vocab_size, stack.embedding_size) for stack in (config.encoder, config.decoder)]
    refuse(
        config.tie_encoder_decoder_embeddings and shapes[0] != shapes[1],
        f"`tie_encoder_decoder_embeddings=True` needs equal `vocab_size` and `embedding_size` in both stacks, got "
        f"{shapes[0]} and {shapes[1]}; set it to False.",
    )
