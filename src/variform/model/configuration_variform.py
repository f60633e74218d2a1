"""The three configs of the family: every architectural choice is a field, checked when the config is built."""

import copy
import math
from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checks import (
    Number,
    check_choices,
    check_combinations,
    check_keys,
    check_memory,
    check_pair,
    check_sizes,
    checked,
    refuse,
)
from .expert_fields import ExpertFields, check_experts, default_balance_coef, set_expert_defaults
from .limits import check_lengths, check_parameters, check_stored
from .local_patterns import SlidingWindow
from .pattern_base import Pattern
from .patterns import parse
from .sharding import expert_plan, fsdp_plan, tensor_plan
from .sparse_patterns import Lsh

VERSION = "0.1.0"

PositionEmbeddingType = Literal[
    "none", "learned", "axial", "sinusoidal", "rope", "relative_bias", "alibi", "transformer_xl"
]
NormType = Literal["layer_norm", "rms_norm"]
NormPlacement = Literal["pre", "post", "sandwich", "reordered"]
Pooling = Literal["first", "mean", "last"]

# One table drives registration and publishing: `model_type -> {Auto class: "file.Class"}`. It is written whole into every
# saved config, so that a repo saved from any head loads through every Auto class.
AUTO_MAP: dict[str, dict[str, str]] = {
    "variform_encoder": {
        "AutoConfig": "configuration_variform.VariformEncoderConfig",
        "AutoModel": "modeling_variform.VariformEncoderModel",
        "AutoModelForMaskedLM": "modeling_variform.VariformEncoderForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_variform.VariformEncoderForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_variform.VariformEncoderForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_variform.VariformEncoderForQuestionAnswering",
        "AutoModelForMultipleChoice": "modeling_variform.VariformEncoderForMultipleChoice",
    },
    "variform_decoder": {
        "AutoConfig": "configuration_variform.VariformDecoderConfig",
        "AutoModel": "modeling_variform.VariformDecoderModel",
        "AutoModelForCausalLM": "modeling_variform.VariformDecoderForCausalLM",
        "AutoModelForSequenceClassification": "modeling_variform.VariformDecoderForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_variform.VariformDecoderForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_variform.VariformDecoderForQuestionAnswering",
    },
    "variform_encoder_decoder": {
        "AutoConfig": "configuration_variform.VariformEncoderDecoderConfig",
        "AutoModel": "modeling_variform.VariformEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "modeling_variform.VariformEncoderDecoderForConditionalGeneration",
    },
}


class VariformBaseConfig(PreTrainedConfig):
    """What the three configs share: unknown keys are refused, and the whole `AUTO_MAP` entry is saved."""

    variform_version: str | None = None
    origin: dict[str, Any] | None = field(default=None, compare=False)  # a form is the same wherever it came from

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["variform_version"] = VERSION
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VariformBaseConfig":
        """A config from what a file holds; `kwargs`, which the caller gives, are not judged as the file is.

        Raises:
            ValueError: as the class does, and for what no file may hold; see `check_stored`.
        """
        check_stored(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs) -> None:
        # Written whole: transformers alone would record only the head being saved
        self.auto_map = dict(AUTO_MAP[self.model_type])
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


@checked
class VariformStackConfig(ExpertFields, VariformBaseConfig):
    r"""
    The fields of one stack of Transformer layers; an encoder and a decoder differ by class, not by field.

    Size:
        vocab_size: number of tokens in the vocabulary. hidden_size: width of the residual stream.
        intermediate_size: inner width of the feed-forward network. Default: 4 x hidden_size, or 8/3 of it rounded up to a
            multiple of 64 when `gated_mlp` (equal parameters).
        num_hidden_layers: number of layers.
        num_hidden_groups: number of distinct sets of layer weights; consecutive layers share one (ALBERT). Default: one each.
        num_attention_heads: number of query heads. head_dim: width of each. Default: hidden_size / num_attention_heads.
        num_key_value_heads: number of key and value heads; divides the query heads (1: multi-query). Default: as many.
        max_position_embeddings: longest sequence, in tokens; a hard limit for `learned` positions only.
    Embeddings:
        embedding_size: width of the token embeddings when narrower than the model (ALBERT). Default: hidden_size.
        embedding_scale: factor on the token embeddings; "sqrt" is the square root of their width.
        embedding_norm: normalise the sum of the embeddings. type_vocab_size: number of BERT's segments; 0 for none.
        tie_word_embeddings: the language-model head uses the token embeddings.
    Positions:
        position_embedding_type: none, learned, axial (Reformer: learned, of two small tables), sinusoidal, rope, relative_bias
            (T5), alibi or transformer_xl (needs an even hidden_size).
        rope_parameters: transformers' dict, `{"rope_type": ..., "rope_theta": ..., "partial_rotary_factor": ...}`, or one
            such dict a layer type.
        relative_attention_num_buckets, relative_attention_max_distance: T5's buckets; distances in tokens.
        position_offset: row of the learned or sinusoidal table for position 0 (RoBERTa and BART: 2); the learned table has
            max_position_embeddings + position_offset rows.
        axial_shape: rows of the two tables of axial positions; position p has vector p // axial_shape[1] of the first beside
            vector p % axial_shape[1] of the second. Default: as square as holds max_position_embeddings.
        axial_dims: their widths, together the token embeddings'. Default: half each.
        sinusoidal_layout: all sines then all cosines (concatenated), or alternating (interleaved).
        sinusoidal_exponent: base 10000 to the power of 2i/d, or of 2i/(d-2) (fairseq).
    Norms and residuals:
        norm_type: layer_norm or rms_norm. norm_eps: its epsilon. norm_bias: layer_norm has a bias.
        norm_unit_offset: rms_norm multiplies by 1 + weight (Gemma).
        norm_placement: pre; post; sandwich (before and after each sublayer); reordered (after the sublayer, inside the
            residual, OLMo 2).
        final_norm: normalise the last hidden states. Default: unless norm_placement is post.
        skip_first_norm: no norm before the first attention (ModernBERT, whose embeddings are normalised).
        layer_scale_init: start value of a learned factor on each residual branch (CaiT); None for no factor.
        parallel_residual: attention and feed-forward read the same hidden states (GPT-NeoX).
        residual_streams: 1; or 2, where attention reads the second and adds to the first, the feed-forward reads the first and
            adds to the second, and what comes out is both, 2 x hidden_size wide (Reformer). Needs norm_placement pre.
    Attention:
        attention_bias: biases on all projections, on none, or a list of "q", "k", "v", "o".
        qk_norm: normalise queries and keys per "head" (Qwen3) or over their "full" width (OLMo 2).
        attention_scale: factor on the scores. Default: head_dim ** -0.5 (T5: 1.0).
        attn_logit_softcapping: scores are cap * tanh(score / cap) (Gemma 2).
        attention_sinks: one learned logit a head joins each softmax (gpt-oss).
        attention_patterns: what a query may see, tiled over the layers; each a string or a dict: "full", "sliding_window:512"
            (causal: 512 keys with the query itself; both ways: 512 on each side), "dilated", "chunked", "local_global",
            "strided", "fixed", "big_bird", "lsh", "prefix_lm", with the fields of the classes that `patterns.py` lists.
        memory_length: how many of its last inputs each layer of a decoder keeps from one call to the next, without gradient,
            and attends to as well (Transformer-XL); 0 for none. They travel as past_key_values, in place of keys and values.
    Feed-forward:
        hidden_act: any activation of transformers' ACT2FN. gated_mlp: GLU variant. mlp_bias: biases.
        glu_limit, glu_offset: the gated product is act(min(gate, limit)) * (clamp(up, -limit, limit) + offset) (gpt-oss: 7, 1).
    Experts: num_experts and all of `ExpertFields`.
    Heads:
        lm_head_transform: dense, activation and norm before the language-model head (BERT). lm_head_bias: a bias a token.
        logit_scale: factor on the logits (T5 v1.0: hidden_size ** -0.5). final_logit_softcapping: Gemma 2.
        classifier_pooling: what stands for a sequence: its first or last real token, or their mean.
        pooler: dense and activation on the pooled token, in the base model of an encoder (BERT). pooler_act: its activation.
        classifier_transform: dense, activation and norm before each classifier's output (ModernBERT).
        classifier_bias: the output of sequence classification and multiple choice has a bias (Llama: none).
        head_act, head_bias: activation and bias of the dense in both transforms. Default: hidden_act and mlp_bias.
    Regularisation, loss and start:
        hidden_dropout, attention_dropout, activation_dropout, classifier_dropout: probabilities.
        layerdrop: probability that a layer is passed over in training (arXiv:1909.11556).
        label_smoothing, z_loss_coef: of the training loss of language-model heads.
        initializer_range: standard deviation of the initial weights.
    Record:
        origin: where the weights came from: the native `model_type`, and those of its fields that no field here decides;
            written by `from_hf`, read by `to_hf`.

    Raises:
        ValueError: for an unknown key, a bad value or fields that contradict each other, naming the field and the mend.
    """

    model_type: ClassVar[str] = ""
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    is_causal_stack: ClassVar[bool] = False

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_hidden_groups: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048

    embedding_size: int | None = None
    embedding_scale: Number | Literal["sqrt"] = 1.0
    embedding_norm: bool = False
    type_vocab_size: int = 0
    tie_word_embeddings: bool = True

    position_embedding_type: PositionEmbeddingType = "rope"
    rope_parameters: dict[str, Any] | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    position_offset: int = 0
    axial_shape: Any = None
    axial_dims: Any = None
    sinusoidal_layout: Literal["concatenated", "interleaved"] = "concatenated"
    sinusoidal_exponent: Literal["2i/d", "2i/(d-2)"] = "2i/d"

    norm_type: NormType = "rms_norm"
    norm_eps: Number = 1e-6
    norm_bias: bool = True
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "pre"
    final_norm: bool | None = None
    skip_first_norm: bool = False
    layer_scale_init: Number | None = None
    parallel_residual: bool = False
    residual_streams: int = 1

    attention_bias: bool | list[str] = False
    qk_norm: Literal["head", "full"] | None = None
    attention_scale: Number | None = None
    attn_logit_softcapping: Number | None = None
    attention_sinks: bool = False
    attention_patterns: list[Any] = field(default_factory=lambda: ["full"])
    memory_length: int = 0

    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    glu_limit: Number | None = None
    glu_offset: Number = 0.0

    lm_head_transform: bool = False
    lm_head_bias: bool = False
    logit_scale: Number = 1.0
    final_logit_softcapping: Number | None = None
    classifier_pooling: Pooling = "mean"
    pooler: bool = False
    pooler_act: str = "tanh"
    classifier_transform: bool = False
    classifier_bias: bool = True
    head_act: str | None = None
    head_bias: bool | None = None

    hidden_dropout: Number = 0.0
    attention_dropout: Number = 0.0
    activation_dropout: Number = 0.0
    classifier_dropout: Number = 0.0
    layerdrop: Number = 0.0
    label_smoothing: Number = 0.0
    z_loss_coef: Number = 0.0
    initializer_range: Number = 0.02

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs, VERSION)
        check_lengths(self)
        check_sizes(self)
        if self.intermediate_size is None:
            gated = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
            self.intermediate_size = gated if self.gated_mlp else 4 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.final_norm is None:
            self.final_norm = self.norm_placement != "post"
        if self.position_embedding_type == "axial":
            self._set_axes()
        refuse(not self.attention_patterns, "`attention_patterns=[]` is empty: name at least one, such as 'full'.")
        self.attention_patterns = [parse(spec).to_dict() for spec in self.attention_patterns]
        self.rope_parameters = copy.deepcopy(self.rope_parameters)
        set_expert_defaults(self)
        check_parameters(self)
        check_memory(self)
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None
        check_choices(self)
        check_combinations(self)
        check_experts(self)

    def _set_axes(self) -> None:
        """The tables of axial positions, where they are not given."""
        if self.axial_shape is None:
            columns = math.isqrt(self.max_position_embeddings - 1) + 1
            self.axial_shape = [math.ceil(self.max_position_embeddings / columns), columns]
        if self.axial_dims is None:
            self.axial_dims = [self.embedding_size // 2, self.embedding_size - self.embedding_size // 2]

    @property
    def output_size(self) -> int:
        """Width of the last hidden states, which hold all residual streams."""
        return self.residual_streams * self.hidden_size

    @property
    def lm_head_size(self) -> int | None:
        """Width of what the language-model head scores: the token embeddings', which two streams are too wide for."""
        return self.embedding_size if self.residual_streams == 1 else self.output_size

    @property
    def longest_table(self) -> int | None:
        """How many positions a learned table holds; None for schemes without one."""
        if self.position_embedding_type == "axial":
            return math.prod(self.axial_shape)
        return self.max_position_embeddings if self.position_embedding_type == "learned" else None

    def pattern_of(self, layer_idx: int) -> Pattern:
        """What the queries of one layer may see."""
        entry = self.attention_patterns[layer_idx % len(self.attention_patterns)]
        return parse(entry).at_layer(layer_idx)

    @property
    def layer_types(self) -> list[str]:
        """Hugging Face's name for what each layer's cache must hold: the last keys ("sliding_attention") or all of them.

        A memory holds each layer's last inputs, whatever its pattern.
        """
        if self.memory_length > 0:
            return ["sliding_attention"] * self.num_hidden_layers
        patterns = [parse(entry) for entry in self.attention_patterns]
        types = ["full_attention" if p.retained(is_causal=True) is None else "sliding_attention" for p in patterns]
        return [types[i % len(types)] for i in range(self.num_hidden_layers)]

    @layer_types.setter
    def layer_types(self, types: list[str]) -> None:  # PEFT's ShadowConfig writes what it read, for fewer layers
        if list(types) != self.layer_types:
            raise ValueError(f"`layer_types={types}` cannot be set: it follows from `attention_patterns`, a field.")

    @property
    def sliding_window(self) -> int | None:
        """How many of the last keys the caches of sliding layers hold; both ways, the widest window; None without any.

        transformers counts the query's own key, so that a memory of M inputs is a window of M + 1.
        """
        if self.memory_length > 0:
            return self.memory_length + 1
        patterns = [parse(entry) for entry in self.attention_patterns]
        if not self.is_causal_stack:
            return max((p.window for p in patterns if isinstance(p, SlidingWindow)), default=None)
        return max((kept for p in patterns if (kept := p.retained(is_causal=True)) is not None), default=None)

    @sliding_window.setter
    def sliding_window(self, window: int) -> None:
        # Tools set it on any config; without sliding windows there is nothing to change
        for entry in self.attention_patterns:
            if entry["name"] == "sliding_window":
                entry["window"] = window

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        return fsdp_plan(self)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        return tensor_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: dict[str, str]) -> None:
        """Takes no note: transformers 5.20 writes back the plan that it read, whose embeddings are sharded already."""

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        return expert_plan(self)

    @property
    def expert_parameters(self) -> list[str]:
        """The names of the tensors that hold the experts in the "fused" layout."""
        projections = ["gate_up_proj" if self.gated_mlp else "up_proj", "down_proj"]
        return projections + [f"{name}_bias" for name in projections if self.mlp_bias]

    @property
    def biased_projections(self) -> set[str]:
        """Which of the projections "q", "k", "v", "o" have a bias."""
        if isinstance(self.attention_bias, bool):
            return set("qkvo") if self.attention_bias else set()
        return set(self.attention_bias)

    def rope_parameters_of(self, layer_type: str) -> dict[str, Any] | None:
        """The rope dict of one layer type: its own entry, or the one that serves all layers."""
        if self.rope_parameters is not None and layer_type in self.rope_parameters:
            return self.rope_parameters[layer_type]
        return self.rope_parameters

    @property
    def sorts_texts(self) -> bool:
        """Whether a layer sorts whole texts by hash, so that no cache can hold what earlier tokens saw."""
        return any(isinstance(p, Lsh) and p.chunked for p in map(parse, self.attention_patterns))


@checked
class VariformEncoderConfig(VariformStackConfig):
    """A stack that sees both ways (BERT); fields as in `VariformStackConfig`."""

    model_type: ClassVar[str] = "variform_encoder"


@checked
class VariformDecoderConfig(VariformStackConfig):
    """A stack that sees the past (GPT); fields as in `VariformStackConfig`, classifiers read the last token."""

    model_type: ClassVar[str] = "variform_decoder"
    is_causal_stack: ClassVar[bool] = True

    classifier_pooling: Pooling = "last"


# What belongs to the pair, and is refused in `encoder` and `decoder` when it differs from the default
PAIR_FIELDS = ("label_smoothing", "z_loss_coef", "router_z_loss_coef", "origin")
MIRRORED_FIELDS = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@checked
class VariformEncoderDecoderConfig(VariformBaseConfig):
    r"""
    An encoder and a decoder that attends to it (T5). The two may differ in every field, width and depth included.

    Args:
        encoder, decoder: a dict of fields, a config, or unset for the defaults.
        pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: special tokens of the pair.
        tie_word_embeddings: the head uses the decoder's token embeddings.
        tie_encoder_decoder_embeddings: the decoder uses the encoder's token embeddings. Default: when their shapes agree.
        label_smoothing, z_loss_coef, router_aux_loss_coef, router_z_loss_coef: of the training loss.
        origin: where the weights of both stacks came from, as in `VariformStackConfig`.

    `hidden_size vocab_size num_hidden_layers num_attention_heads num_key_value_heads` mirror the decoder's, read-only, where
    PEFT and generation look for them.

    Raises:
        ValueError: for an unknown key, a bad value or fields that contradict each other, naming the field and the mend.
    """

    model_type: ClassVar[str] = "variform_encoder_decoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "encoder_last_hidden_state"]
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # the stacks bring their own
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "encoder": SubConfigSpec(VariformEncoderConfig),
        "decoder": SubConfigSpec(VariformDecoderConfig),
    }

    encoder: Any = None
    decoder: Any = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    tie_encoder_decoder_embeddings: bool | None = None
    label_smoothing: Number = 0.0
    z_loss_coef: Number = 0.0
    router_aux_loss_coef: Number | None = None
    router_z_loss_coef: Number = 0.0
    initializer_range: Number = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for name in MIRRORED_FIELDS:
            kwargs.pop(name, None)
        check_keys(self, kwargs, VERSION)
        self.encoder = self._with_pair_ids("encoder", self.encoder)
        self.decoder = self._with_pair_ids("decoder", self.decoder)
        super().__post_init__(**kwargs)
        if self.router_aux_loss_coef is None:
            stacks = (self.encoder, self.decoder)
            self.router_aux_loss_coef = max(default_balance_coef(s.num_experts, s.router_type) for s in stacks)
        if self.tie_encoder_decoder_embeddings is None:
            shapes = [(stack.vocab_size, stack.embedding_size) for stack in (self.encoder, self.decoder)]
            self.tie_encoder_decoder_embeddings = shapes[0] == shapes[1]
        check_pair(self)

    def _with_pair_ids(self, side: str, stack: Any) -> Any:
        """The sub-config's dict with the pair's special ids, so that each stack knows its padding."""
        stack = stack.to_dict() if isinstance(stack, PreTrainedConfig) else stack
        is_fields = stack is None or isinstance(stack, dict)
        refuse(not is_fields, f"`{side}={stack!r}` is neither a dict of fields nor a config.")
        stack = dict(stack or {})
        for name in PAIR_FIELDS:
            refuse(
                bool(stack.get(name)),
                f"`{side}.{name}={stack.get(name)}` belongs to the pair: set `{name}` beside `{side}`, not inside it.",
            )
        coef = stack.pop("router_aux_loss_coef", None)
        default = default_balance_coef(stack.get("num_experts", 0), stack.get("router_type", "softmax_topk"))
        refuse(
            coef not in (None, default),
            f"`{side}.router_aux_loss_coef={coef}` belongs to the pair: set it beside `{side}`, not inside it.",
        )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            stack[name] = getattr(self, name) if getattr(self, name) is not None else stack.get(name)
        stack.setdefault("use_cache", self.use_cache)
        stack.pop("auto_map", None)  # of a stack that was saved on its own; the pair's names all code
        if stack.get("residual_streams", 1) != 1:
            stack.setdefault("tie_word_embeddings", False)  # the only head is the pair's
        wanted = self.sub_configs_defaults[side].model_type
        refuse(stack.pop("model_type", wanted) != wanted, f"`{side}` must be a {wanted} config.")
        return stack

    # Read-only, but for the vocabulary: resizing the embeddings writes it here
    hidden_size = property(lambda self: self.decoder.hidden_size)
    num_hidden_layers = property(lambda self: self.decoder.num_hidden_layers)
    num_attention_heads = property(lambda self: self.decoder.num_attention_heads)
    num_key_value_heads = property(lambda self: self.decoder.num_key_value_heads)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.decoder.vocab_size = value
        if self.tie_encoder_decoder_embeddings:
            self.encoder.vocab_size = value

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.update({name: getattr(self, name) for name in MIRRORED_FIELDS})
        return output

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The decoder's config, the encoder's with `encoder=True` alone, or this one when neither is asked for."""
        if encoder and not decoder:
            return self.encoder
        return self.decoder if decoder and not encoder else self
