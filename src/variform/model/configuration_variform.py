"""The three configs of the family: every architectural choice is a field, checked when the config is built."""

import copy
import difflib
import math
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .patterns import Lsh, Pattern, SlidingWindow, parse

VERSION = "0.1.0"

PositionEmbeddingType = Literal[
    "none", "learned", "axial", "sinusoidal", "rope", "relative_bias", "alibi", "transformer_xl"
]
NormType = Literal["layer_norm", "rms_norm"]
NormPlacement = Literal["pre", "post", "sandwich", "reordered"]
RouterType = Literal["softmax_topk", "switch", "sigmoid_bias", "expert_choice"]
Pooling = Literal["first", "mean", "last"]
Number = int | float

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
            raise ValueError(f"`{name}={value!r}` has a wrong type: {error.__cause__}.") from error

    config_class.__setattr__ = assign_checked
    return config_class


class VariformBaseConfig(PreTrainedConfig):
    """What the three configs share: unknown keys are refused, and the whole `AUTO_MAP` entry is saved."""

    variform_version: str | None = None
    origin: dict[str, Any] | None = field(default=None, compare=False)  # a form is the same wherever it came from

    def refuse_unknown_keys(self, keys: dict[str, Any]) -> None:
        """Raises `ValueError` for a key that is neither a field nor known to the platform, with the nearest field."""
        known = {f.name for f in fields(self)} | PLATFORM_KEYS
        known |= set(GenerationConfig._get_default_generation_params())
        for key in keys:
            if key in known or key.startswith("_"):
                continue
            refuse(
                key.startswith("cross_att") and "pattern" in key,
                f"`{key}` is not a field: cross-attention is always full, and `attention_patterns` of the encoder and of the "
                "decoder shape how each attends to itself; leave it out.",
            )
            newer = self.variform_version is not None and version_tuple(self.variform_version) > version_tuple(VERSION)
            if newer:
                raise ValueError(
                    f"`{key}` is not a field of {type(self).__name__} in Variform {VERSION}; this config was saved by "
                    f"{self.variform_version}: `pip install 'variform>={self.variform_version}'`."
                )
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see the class docstring for the fields."
            raise ValueError(f"`{key}` is not a field of {type(self).__name__}; {hint}")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["variform_version"] = VERSION
        return output

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs) -> None:
        # Written whole: transformers alone would record only the head being saved
        self.auto_map = dict(AUTO_MAP[self.model_type])
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def version_tuple(version: str) -> tuple[int, ...]:
    """`"0.12.1"` -> `(0, 12, 1)`; what is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def default_balance_coef(num_experts: int, router_type: str) -> float:
    """Of the balance loss: routers with a bias, and experts that choose, are even without it."""
    return 0.01 if num_experts > 0 and router_type in ("softmax_topk", "switch") else 0.0


@checked
class VariformStackConfig(VariformBaseConfig):
    r"""
    The fields of one stack of Transformer layers; an encoder and a decoder differ by class, not by field.

    Size:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the feed-forward network. Default: 4 x hidden_size, or 8/3 of it rounded up to a
            multiple of 64 when `gated_mlp` (equal parameters).
        num_hidden_layers: number of layers.
        num_hidden_groups: number of distinct sets of layer weights; consecutive layers share one (ALBERT). Default: one each.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; divides the query heads (1: multi-query). Default: as many.
        head_dim: width of one head. Default: hidden_size / num_attention_heads.
        max_position_embeddings: longest sequence, in tokens; a hard limit for `learned` positions only.
    Embeddings:
        embedding_size: width of the token embeddings when narrower than the model (ALBERT). Default: hidden_size.
        embedding_scale: factor on the token embeddings; "sqrt" is the square root of their width.
        embedding_norm: normalise the sum of the embeddings.
        type_vocab_size: number of token types (BERT's segments); 0 for none.
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
            "strided", "fixed", "big_bird", "lsh", "prefix_lm", with the fields of the classes in `patterns.py`.
        memory_length: how many of its last inputs each layer of a decoder keeps from one call to the next, without gradient,
            and attends to as well (Transformer-XL); 0 for none. They travel as past_key_values, in place of keys and values.
    Feed-forward:
        hidden_act: any activation of transformers' ACT2FN. gated_mlp: GLU variant. mlp_bias: biases.
    Experts:
        num_experts: networks among which each token of a sparse layer chooses; 0 for none.
        mlp_layer_types: "dense" or "sparse" for each layer; a shorter list is tiled. Default: all sparse if there are experts.
        num_experts_per_tok: how many a token uses (with expert_choice, on average). Default: 2; 1 for switch.
        moe_intermediate_size: inner width of an expert. Default: intermediate_size.
        num_shared_experts: experts that all tokens use besides. shared_expert_gate: a sigmoid gate on their sum (Qwen2-MoE).
        router_type: softmax_topk (Mixtral); switch (one expert, of limited capacity, weighted by its softmax score);
            sigmoid_bias (DeepSeek-V3: a bias for choosing only); expert_choice (each expert takes its best tokens; encoders).
        norm_topk_prob: the weights of a token's experts add up to 1. Default: where it has several.
        routed_scaling_factor: factor on the weights.
        n_group, topk_group: sigmoid_bias chooses within the topk_group best of n_group groups of experts.
        router_bias_update_rate: step of that bias towards an even load, after each optimizer step.
        router_jitter_noise: in training, the router (not the experts) reads its input times 1 +- this much.
        expert_capacity_factor: an expert takes at most this many times its even share of a sequence's real tokens, the first
            ones; others pass by on the residual. Default: no limit; 1.25 for switch. expert_capacity: the same as a number.
        expert_capacity_in_eval: a decoder has the limit in evaluation as well, and then no cache (encoders always have it).
        router_aux_loss_coef: of the balance loss, in training. Default: 0.01; 0 where routers balance otherwise.
        router_z_loss_coef: of the mean squared logsumexp of router logits, in training.
        experts_layout: "fused" (one tensor a projection) or "modulelist" (one nn.Linear an expert, for LoRA and quantizers).
    Heads:
        lm_head_transform: dense, activation and norm before the language-model head (BERT). lm_head_bias: a bias a token.
        logit_scale: factor on the logits (T5 v1.0: hidden_size ** -0.5). final_logit_softcapping: Gemma 2.
        classifier_pooling: what stands for a sequence: its first or last real token, or their mean.
        pooler: dense and activation on the pooled token, in the base model of an encoder (BERT).
        pooler_act: the pooler's activation (DistilBERT: relu).
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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
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

    num_experts: int = 0
    mlp_layer_types: list[str] | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    shared_expert_gate: bool = False
    router_type: RouterType = "softmax_topk"
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Number = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_bias_update_rate: Number = 0.001
    router_jitter_noise: Number = 0.0
    expert_capacity_factor: Number | None = None
    expert_capacity: int | None = None
    expert_capacity_in_eval: bool = False
    router_aux_loss_coef: Number | None = None
    router_z_loss_coef: Number = 0.0
    experts_layout: Literal["fused", "modulelist"] = "fused"

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
        self.refuse_unknown_keys(kwargs)
        self._check_sizes()
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
        self._set_experts()
        self._check_memory()
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None
        self._check_choices()
        self._check_combinations()

    def _set_experts(self) -> None:
        """What follows from the number of experts and the router, where it is not given."""
        is_switch = self.router_type == "switch"
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = default_balance_coef(self.num_experts, self.router_type)
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = 1 if is_switch else min(2, max(1, self.num_experts))
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1 and self.router_type in ("softmax_topk", "sigmoid_bias")
        if is_switch and self.expert_capacity is None and self.expert_capacity_factor is None:
            self.expert_capacity_factor = 1.25
        if self.mlp_layer_types is None and self.num_experts > 0:
            self.mlp_layer_types = ["sparse"]
        if self.mlp_layer_types:
            # transformers checks that there is one for each layer
            types = self.mlp_layer_types
            self.mlp_layer_types = [types[i % len(types)] for i in range(self.num_hidden_layers)]

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether a layer has experts in place of a feed-forward."""
        types = self.mlp_layer_types or ["dense"]
        return types[layer_idx % len(types)] == "sparse"

    @property
    def routes_by_row(self) -> bool:
        """Whether the tokens of a row compete for the experts."""
        has_capacity = self.expert_capacity is not None or self.expert_capacity_factor is not None
        return self.num_experts > 0 and (has_capacity or self.router_type == "expert_choice")

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
        """The units that FSDP2 shards; the last norm stays whole because the head reads it at once.

        The head is part of the root's unit, where its weight is whole and plain while the loss reads it (the fast way of
        `linear_cross_entropy`); a table that it is tied to must stay whole as well.
        """
        table = "keep_full_weight" if self.tie_word_embeddings else "free_full_weight"
        plan = {"embed_tokens": table, "layers.*": "free_full_weight"}
        return {**plan, "norm": "keep_full_weight"} if self.final_norm else plan

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards a layer: each process computes some heads and a slice of the feed-forward.

        Where a head has data of its own (its bias, sink, pattern or share of a norm), queries, keys and values are gathered
        and each process computes all heads: still right, and slower.
        """
        patterns = [parse(entry) for entry in self.attention_patterns]
        is_per_head = self.attention_sinks or self.qk_norm == "full"
        is_per_head = is_per_head or any(len(p.by_head(self.num_attention_heads)) > 1 for p in patterns)
        hashes = [isinstance(p, Lsh) for p in patterns]
        is_per_head = is_per_head or any(hashes)
        if is_per_head or self.position_embedding_type in ("relative_bias", "alibi", "transformer_xl"):
            split, merge = "colwise_gather_output", "rowwise_split_input"
        else:
            split, merge = "colwise", "rowwise"
        attention = {"q_proj": split, "k_proj": split, "v_proj": split, "o_proj": merge}
        if all(hashes):
            del attention["k_proj"]
        if self.position_embedding_type == "transformer_xl":
            attention["r_proj"] = split
        if any(getattr(p, "global_projections", False) for p in patterns):
            attention |= {f"{name}_global": split for name in ("q_proj", "k_proj", "v_proj")}
        if self.qk_norm == "head":
            norm = "replicated_with_grad_allreduce" if split == "colwise" else "replicate"
            attention |= dict.fromkeys(["q_norm"] if all(hashes) else ["q_norm", "k_norm"], norm)
        plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
        plan |= {f"layers.*.mlp.{name}": style for name, style in self._feed_forward_tp_plan().items()}
        return {"embed_tokens": "embedding_rowwise", **plan}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: dict[str, str]) -> None:
        """Takes no note: transformers 5.20 writes back the plan that it read, whose embeddings are sharded already."""

    def _feed_forward_tp_plan(self) -> dict[str, str]:
        """Each process holds a slice of every expert and of the shared ones; routers and their gates stay whole."""
        feed_forward = {"up_proj": "colwise", "down_proj": "rowwise"}
        if self.gated_mlp:
            feed_forward["gate_proj"] = "colwise"
        are_sparse = set(map(self.is_sparse_layer, range(self.num_hidden_layers)))
        plan = dict(feed_forward) if False in are_sparse else {}
        if True not in are_sparse:
            return plan
        if self.num_shared_experts:
            plan |= {f"shared_experts.{name}": style for name, style in feed_forward.items()}
        if self.experts_layout == "modulelist":
            return plan | {f"experts.*.{name}": style for name, style in feed_forward.items()}
        # On the biases, one row an expert, the row styles split the last axis
        styles = {
            "gate_up_proj": "packed_colwise",
            "gate_up_proj_bias": "packed_rowwise",
            "up_proj": "colwise",
            "up_proj_bias": "rowwise",
            "down_proj": "rowwise",
            "down_proj_bias": "replicate",
        }
        plan |= {f"experts.{name}": styles[name] for name in self.expert_parameters}
        return {**plan, "experts": "moe_tp_experts"}

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """How expert parallelism shares out sparse layers: each process holds some experts whole, and tokens travel to them."""
        has_experts = any(map(self.is_sparse_layer, range(self.num_hidden_layers)))
        if not has_experts or self.experts_layout == "modulelist":
            return {}
        plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in self.expert_parameters}
        return {**plan, "layers.*.mlp.experts": "ep_dispatch_experts"}

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

    def _check_sizes(self) -> None:
        counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in counts:
            refuse(getattr(self, name) < 1, f"`{name}={getattr(self, name)}` must be at least 1.")
        for name in ("intermediate_size", "head_dim", "num_key_value_heads", "embedding_size", "num_hidden_groups"):
            value = getattr(self, name)
            refuse(value is not None and value < 1, f"`{name}={value}` must be at least 1, or unset to derive it.")
        refuse(self.type_vocab_size < 0, f"`type_vocab_size={self.type_vocab_size}` must be 0 (none) or more.")
        refuse(self.position_offset < 0, f"`position_offset={self.position_offset}` must be 0 or more.")
        refuse(
            self.head_dim is None and self.hidden_size % self.num_attention_heads != 0,
            f"`hidden_size={self.hidden_size}` is not a multiple of `num_attention_heads={self.num_attention_heads}`; "
            "set `head_dim` to choose the width of a head freely.",
        )

    def _check_choices(self) -> None:
        for name in ("hidden_act", "pooler_act"):
            one_of(name, getattr(self, name), list(ACT2FN))
        one_of("head_act", self.head_act, [None, *ACT2FN])
        dropouts = [f"{name}_dropout" for name in ("hidden", "attention", "activation", "classifier")]
        for name in (*dropouts, "layerdrop", "label_smoothing"):
            value = getattr(self, name)
            refuse(not 0 <= value < 1, f"`{name}={value}` is a probability: it must lie in [0, 1).")
        refuse(self.z_loss_coef < 0, f"`z_loss_coef={self.z_loss_coef}` must be 0 (off) or more.")
        refuse(self.norm_eps <= 0, f"`norm_eps={self.norm_eps}` must be above 0.")
        refuse(self.initializer_range < 0, f"`initializer_range={self.initializer_range}` must be 0 or more.")
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_scale"):
            value = getattr(self, name)
            refuse(value is not None and value <= 0, f"`{name}={value}` must be above 0, or null to leave it out.")
        if not isinstance(self.attention_bias, bool):
            for projection in self.attention_bias:
                one_of("attention_bias", projection, ["q", "k", "v", "o"])
        eos_ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, ids in (("pad", [self.pad_token_id]), ("bos", [self.bos_token_id]), ("eos", eos_ids)):
            for token_id in ids:
                refuse(
                    token_id is not None and not 0 <= token_id < self.vocab_size,
                    f"`{name}_token_id={token_id}` is outside the vocabulary: `vocab_size={self.vocab_size}`.",
                )

    def _check_combinations(self) -> None:
        refuse(
            self.num_attention_heads % self.num_key_value_heads != 0,
            f"`num_key_value_heads={self.num_key_value_heads}` does not divide "
            f"`num_attention_heads={self.num_attention_heads}`.",
        )
        self._check_groups()
        refuse(
            self.norm_unit_offset and self.norm_type != "rms_norm",
            f"`norm_unit_offset=True` is a form of rms_norm, got `norm_type={self.norm_type!r}`; drop one of them.",
        )
        refuse(
            self.parallel_residual and self.norm_placement != "pre",
            f"`parallel_residual=True` needs `norm_placement='pre'`, got {self.norm_placement!r}.",
        )
        refuse(
            self.skip_first_norm and self.norm_placement not in ("pre", "sandwich"),
            f"`skip_first_norm=True` leaves out a norm that `norm_placement={self.norm_placement!r}` does not have.",
        )
        self._check_streams()
        self._check_experts()
        for entry in self.attention_patterns:
            parse(entry).check(self.is_causal_stack, self.max_position_embeddings, self.num_attention_heads)
        self._check_sorting()
        refuse(
            self.is_causal_stack and self.pooler,
            "`pooler=True` is for encoders; drop it, or set `classifier_transform=True` for a dense layer before the labels.",
        )
        if self.position_embedding_type == "rope":
            self._check_rope()
        if self.position_embedding_type == "sinusoidal":
            refuse(
                self.embedding_size % 2 != 0 or self.embedding_size < 4,
                f"`position_embedding_type='sinusoidal'` needs an even embedding width of at least 4, got "
                f"{self.embedding_size}.",
            )
        if self.position_embedding_type == "axial":
            self._check_axes()
        if self.position_embedding_type == "relative_bias":
            self._check_buckets()
        refuse(
            self.position_embedding_type == "transformer_xl" and self.hidden_size % 2 != 0,
            f"`hidden_size={self.hidden_size}` is odd, and `position_embedding_type='transformer_xl'` has a sine and a cosine "
            "of each frequency; choose an even one.",
        )

    def _check_streams(self) -> None:
        streams = f"`residual_streams={self.residual_streams}`"
        refuse(self.residual_streams not in (1, 2), f"{streams} must be 1 or 2.")
        if self.residual_streams == 1:
            return
        refuse(self.norm_placement != "pre", f"{streams} needs `norm_placement='pre'`, got {self.norm_placement!r}.")
        refuse(
            self.parallel_residual,
            f"{streams} lets the feed-forward read what attention has added to, and `parallel_residual=True` what it has not; "
            "drop one of them.",
        )
        refuse(
            self.tie_word_embeddings,
            f"{streams} gives the language-model head states of {self.output_size}, {self.residual_streams} times as wide as "
            "a layer: set `tie_word_embeddings=False`.",
        )

    @property
    def sorts_texts(self) -> bool:
        """Whether a layer sorts whole texts by hash, so that no cache can hold what earlier tokens saw."""
        return any(isinstance(p, Lsh) and p.chunked for p in map(parse, self.attention_patterns))

    def _check_sorting(self) -> None:
        if not (self.is_causal_stack and self.sorts_texts):
            return
        entry = next(str(p) for p in map(parse, self.attention_patterns) if isinstance(p, Lsh) and p.chunked)
        refuse(
            self.use_cache,
            f"`use_cache=True`: `attention_patterns` entry '{entry}' sorts the whole text anew with each token, which no cache "
            "holds; set it to False, or use `chunked=false`.",
        )
        refuse(
            self.memory_length > 0,
            f"`memory_length={self.memory_length}`: `attention_patterns` entry '{entry}' sorts whole texts, of which a memory "
            "holds a part; drop it, or use `chunked=false`.",
        )

    def _check_axes(self) -> None:
        for name in ("axial_shape", "axial_dims"):
            axes = getattr(self, name)
            refuse(len(axes) != 2 or min(axes) < 1, f"`{name}={axes}` must be two numbers from 1 on.")
        refuse(
            math.prod(self.axial_shape) < self.max_position_embeddings,
            f"`axial_shape={self.axial_shape}` holds {math.prod(self.axial_shape)} positions, fewer than "
            f"`max_position_embeddings={self.max_position_embeddings}`; choose larger tables, or unset it to derive it.",
        )
        refuse(
            sum(self.axial_dims) != self.embedding_size,
            f"`axial_dims={self.axial_dims}` must add up to `embedding_size={self.embedding_size}`; unset it to derive it.",
        )

    def _check_groups(self) -> None:
        groups = self.num_hidden_groups or self.num_hidden_layers
        refuse(
            self.num_hidden_layers % groups != 0,
            f"`num_hidden_groups={groups}` does not divide `num_hidden_layers={self.num_hidden_layers}`.",
        )
        size = self.num_hidden_layers // groups
        entries = [self.attention_patterns[i % len(self.attention_patterns)] for i in range(self.num_hidden_layers)]
        refuse(
            any(entries[i] != entries[i // size * size] for i in range(self.num_hidden_layers)),
            f"`num_hidden_groups={groups}` makes layers share weights that `attention_patterns` gives different patterns; "
            "give one pattern to each group.",
        )
        refuse(
            self.skip_first_norm and size > 1,
            f"`skip_first_norm=True` would leave the norm out of {size} layers that share weights "
            f"(`num_hidden_groups={groups}`); drop one of them.",
        )

    def _check_experts(self) -> None:
        experts, per_token = self.num_experts, self.num_experts_per_tok
        refuse(experts < 0, f"`num_experts={experts}` must be 0 (none) or more.")
        is_sparse = "sparse" in (self.mlp_layer_types or [])
        refuse(self.mlp_layer_types == [], "`mlp_layer_types=[]` is empty: name 'dense' or 'sparse' for the layers.")
        for entry in self.mlp_layer_types or []:
            one_of("mlp_layer_types", entry, ("dense", "sparse"))
        refuse(
            experts == 0 and is_sparse,
            f"`num_experts=0` leaves the sparse layers of `mlp_layer_types={self.mlp_layer_types}` without experts; set it to "
            "2 or more, or leave them dense.",
        )
        refuse(
            experts > 0 and not is_sparse,
            f"`num_experts={experts}`, but `mlp_layer_types` has no 'sparse' layer that would have them; name one, or drop it.",
        )
        if experts == 0:
            return
        refuse(
            not 1 <= per_token <= experts,
            f"`num_experts_per_tok={per_token}` must lie between 1 and `num_experts={experts}`.",
        )
        refuse(
            self.moe_intermediate_size < 1, f"`moe_intermediate_size={self.moe_intermediate_size}` must be at least 1."
        )
        refuse(
            self.num_shared_experts < 0, f"`num_shared_experts={self.num_shared_experts}` must be 0 (none) or more."
        )
        refuse(
            self.shared_expert_gate and self.num_shared_experts == 0,
            "`shared_expert_gate=True` gates shared experts: set `num_shared_experts` to 1 or more, or drop it.",
        )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            value = getattr(self, name)
            refuse(value < 0, f"`{name}={value}` must be 0 (off) or more.")
        jitter = self.router_jitter_noise
        refuse(not 0 <= jitter < 1, f"`router_jitter_noise={jitter}` must lie in [0, 1).")
        self._check_router()
        self._check_capacity()
        groups = self.num_hidden_groups or self.num_hidden_layers
        size = max(1, self.num_hidden_layers // groups)
        types = [self.is_sparse_layer(i) for i in range(self.num_hidden_layers)]
        refuse(
            any(types[i] != types[i // size * size] for i in range(self.num_hidden_layers)),
            f"`num_hidden_groups={groups}` makes layers share weights that `mlp_layer_types` makes dense here, sparse there; "
            "give one type to each group.",
        )

    def _check_router(self) -> None:
        experts, per_token, router = self.num_experts, self.num_experts_per_tok, self.router_type
        refuse(
            router == "expert_choice" and self.is_causal_stack,
            "`router_type='expert_choice'` lets experts choose among all tokens, later ones too, which a decoder must not see; "
            "use 'softmax_topk'.",
        )
        refuse(
            router == "switch" and per_token != 1,
            f"`router_type='switch'` uses one expert a token, got `num_experts_per_tok={per_token}`; set it to 1, or use "
            "'softmax_topk'.",
        )
        is_normalised = bool(self.norm_topk_prob)
        refuse(
            is_normalised and router in ("switch", "expert_choice"),
            f"`norm_topk_prob=True` does not go with `router_type={router!r}`, whose weights are the scores; drop it.",
        )
        refuse(
            is_normalised and per_token == 1 and experts > 1,
            "`norm_topk_prob=True` makes the weight of `num_experts_per_tok=1` always 1, from which no router can learn; "
            "set it to False.",
        )
        refuse(
            router == "expert_choice" and self.routed_scaling_factor != 1.0,
            f"`routed_scaling_factor={self.routed_scaling_factor}` is for routers whose tokens choose; leave it 1.0.",
        )
        has_groups = self.n_group != 1 or self.topk_group != 1
        refuse(
            has_groups and router != "sigmoid_bias",
            f"`n_group={self.n_group}` and `topk_group={self.topk_group}` are for `router_type='sigmoid_bias'`; leave them 1.",
        )
        refuse(
            self.n_group < 1 or experts % self.n_group != 0,
            f"`n_group={self.n_group}` does not divide `num_experts={experts}`.",
        )
        refuse(
            not 1 <= self.topk_group <= self.n_group,
            f"`topk_group={self.topk_group}` must lie between 1 and `n_group={self.n_group}`.",
        )
        within = self.topk_group * experts // self.n_group
        refuse(
            per_token > within,
            f"`num_experts_per_tok={per_token}` is more than the {within} experts of `topk_group={self.topk_group}` groups.",
        )

    def _check_capacity(self) -> None:
        factor, capacity = self.expert_capacity_factor, self.expert_capacity
        refuse(
            factor is not None and factor <= 0,
            f"`expert_capacity_factor={factor}` must be above 0; leave it unset for no limit.",
        )
        refuse(
            capacity is not None and capacity < 1,
            f"`expert_capacity={capacity}` must be at least 1 token; leave it unset for no limit.",
        )
        refuse(
            factor is not None and capacity is not None,
            f"`expert_capacity_factor={factor}` and `expert_capacity={capacity}` both limit an expert; give one.",
        )
        refuse(
            self.expert_capacity_in_eval and factor is None and capacity is None,
            "`expert_capacity_in_eval=True`, but there is no capacity; set `expert_capacity_factor`, or drop it.",
        )
        refuse(
            self.expert_capacity_in_eval and not self.is_causal_stack,
            "`expert_capacity_in_eval=True` is for decoders: encoders have the limit in evaluation anyway; drop it.",
        )
        refuse(
            self.expert_capacity_in_eval and self.use_cache,
            "`use_cache=True`: with `expert_capacity_in_eval` an expert's room is counted over the whole text, which a cache "
            "does not hold; set one of them to False.",
        )

    def _check_memory(self) -> None:
        refuse(self.memory_length < 0, f"`memory_length={self.memory_length}` must be 0 (none) or more.")
        refuse(
            self.memory_length > 0 and not self.is_causal_stack,
            f"`memory_length={self.memory_length}` is for decoders: an encoder's tokens see both ways, so that a text cannot "
            "be read in pieces; drop it.",
        )
        by_layer_type = any(isinstance(value, dict) for value in (self.rope_parameters or {}).values())
        refuse(
            self.memory_length > 0 and by_layer_type,
            f"`memory_length={self.memory_length}` makes all layers of one type for their caches, and `rope_parameters` tells "
            "them apart by type; give one dict for all.",
        )

    def _check_rope(self) -> None:
        for layer_type in set(self.layer_types):
            parameters = self.rope_parameters_of(layer_type) or {}
            rope_type = parameters.get("rope_type", "default")
            one_of("rope_parameters['rope_type']", rope_type, ["default", *ROPE_INIT_FUNCTIONS])
            theta = parameters.get("rope_theta")
            refuse(
                not isinstance(theta, (int, float)) or theta <= 0,
                f"`rope_parameters['rope_theta']={theta}` must be above 0.",
            )
            rotated = int(self.head_dim * parameters.get("partial_rotary_factor", 1.0))
            refuse(
                rotated < 2 or rotated % 2 != 0 or rotated > self.head_dim,
                f"`position_embedding_type='rope'` rotates pairs: `head_dim={self.head_dim}` times `partial_rotary_factor="
                f"{parameters.get('partial_rotary_factor', 1.0)}` gives {rotated}; choose an even number.",
            )
            refuse(
                rope_type == "dynamic" and rotated == 2,
                "`rope_parameters['rope_type']='dynamic'` has no scale for a single pair; rotate 4 channels or more.",
            )
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def _check_buckets(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        exact = buckets // (2 if self.is_causal_stack else 4)
        refuse(
            exact < 1 or (not self.is_causal_stack and buckets % 2 != 0),
            f"`relative_attention_num_buckets={buckets}` is too small or odd: causal stacks need 2 or more, "
            "bidirectional ones an even number from 4.",
        )
        refuse(
            distance <= exact,
            f"`relative_attention_max_distance={distance}` must be above {exact}, the distances that "
            f"`relative_attention_num_buckets={buckets}` tells apart one by one.",
        )


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
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "encoder_last_hidden_state"]
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
        self.refuse_unknown_keys(kwargs)
        self.encoder = self._with_pair_ids("encoder", self.encoder)
        self.decoder = self._with_pair_ids("decoder", self.decoder)
        super().__post_init__(**kwargs)
        if self.router_aux_loss_coef is None:
            stacks = (self.encoder, self.decoder)
            self.router_aux_loss_coef = max(default_balance_coef(s.num_experts, s.router_type) for s in stacks)
        self._check_pair()

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
        if stack.get("residual_streams", 1) != 1:
            stack.setdefault("tie_word_embeddings", False)  # the only head is the pair's
        wanted = self.sub_configs_defaults[side].model_type
        refuse(stack.pop("model_type", wanted) != wanted, f"`{side}` must be a {wanted} config.")
        return stack

    def _check_pair(self) -> None:
        smoothing = self.label_smoothing
        refuse(not 0 <= smoothing < 1, f"`label_smoothing={smoothing}` is a probability: it must lie in [0, 1).")
        for name in ("z_loss_coef", "router_aux_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            refuse(value < 0, f"`{name}={value}` must be 0 (off) or more.")
        refuse(
            self.use_cache and self.decoder.sorts_texts,
            "`use_cache=True`: the decoder's `attention_patterns` sort the whole text anew with each token, which no cache "
            "holds; set it to False, or use `chunked=false`.",
        )
        refuse(
            self.decoder.residual_streams != 1,
            f"`decoder.residual_streams={self.decoder.residual_streams}` leaves open which stream attends to the encoder; "
            "use 1.",
        )
        start = self.decoder_start_token_id
        refuse(
            start is not None and not 0 <= start < self.decoder.vocab_size,
            f"`decoder_start_token_id={start}` is outside the vocabulary: `decoder.vocab_size={self.decoder.vocab_size}`.",
        )
        shapes = [(stack.vocab_size, stack.embedding_size) for stack in (self.encoder, self.decoder)]
        if self.tie_encoder_decoder_embeddings is None:
            self.tie_encoder_decoder_embeddings = shapes[0] == shapes[1]
        refuse(
            self.tie_encoder_decoder_embeddings and shapes[0] != shapes[1],
            f"`tie_encoder_decoder_embeddings=True` needs equal `vocab_size` and `embedding_size` in both stacks, got "
            f"{shapes[0]} and {shapes[1]}; set it to False.",
        )

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
