"""Random forms: hypothesis strategies over the whole vocabulary of fields, for the three shapes.

A form is `(shape, fields)`: plain values, so that hypothesis prints them and processes can send them. Forms from
`forms()` are legal; `wild_forms()` draws every field on its own, so that many contradict themselves.
"""

from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny import IDS, VOCAB_SIZE
from transformers.activations import ACT2FN

Form = tuple[str, dict[str, Any]]

MAX_LENGTH = 24
ACTIVATIONS = sorted(ACT2FN)
POSITIONS = ["none", "learned", "axial", "sinusoidal", "rope", "relative_bias", "alibi", "transformer_xl"]
PATTERNS = [
    ["full"],
    ["sliding_window:3"],
    ["sliding_window:2", "full"],
    ["full", "sliding_window:window=2"],
    ["sliding_window:2", "sliding_window:4"],
    ["dilated:2,gap=3"],
    ["dilated:2,gap=1/2", "chunked:4"],
    ["local_global:2,tokens=1", "strided:3"],
    ["strided:2,heads=split", "fixed:4"],
    ["fixed:4,summary=1,groups=2"],
    ["big_bird:2,random=1"],
    ["chunked:3,before=1"],
    ["lsh:4,rounds=2"],
]
ENCODER_PATTERNS = [
    ["sliding_window:1"],
    ["local_global:2,global_projections=true"],
    ["big_bird:1,placement=first"],
    ["lsh:4,chunked=true,chunk=4", "chunked:3,before=1,cyclic=true"],
    ["lsh:2,rounds=3,chunked=true,chunk=3"],
]
DECODER_PATTERNS = [["prefix_lm", "sliding_window:3"]]
NORMS = ["layer_norm", "rms_norm"]
PLACEMENTS = ["pre", "post", "sandwich", "reordered"]
POOLINGS = ["first", "mean", "last"]

# What each rope type needs besides its name, for heads that rotate 4 or 8 channels and texts below `MAX_LENGTH`
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 12},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "proportional": {},
}


def rope_parameters(rope_type: str, head_dim: int, partial: float = 1.0, theta: float = 100.0) -> dict[str, Any]:
    """The complete dict of one rope type; `partial` is the rotated part of a head."""
    parameters = {"rope_type": rope_type, "rope_theta": theta, **ROPES[rope_type]}
    if partial != 1.0:
        parameters["partial_rotary_factor"] = partial
    if rope_type == "longrope":
        pairs = int(head_dim * partial) // 2
        parameters["short_factor"] = [1.0 + 0.5 * i for i in range(pairs)]
        parameters["long_factor"] = [2.0 + 0.5 * i for i in range(pairs)]
    return parameters


@st.composite
def ropes(draw, head_dim: int) -> dict[str, Any]:
    """Rope parameters of any type, for all layers or one dict a layer type."""

    def one():
        partial = draw(st.sampled_from([1.0, 0.5] if head_dim % 4 == 0 else [1.0]))
        # The dynamic base is undefined for a single pair
        names = sorted(name for name in ROPES if name != "dynamic" or head_dim * partial > 2)
        return rope_parameters(draw(st.sampled_from(names)), head_dim, partial, draw(st.sampled_from([20.0, 1e4])))

    if draw(st.booleans()):
        return one()
    return {"full_attention": one(), "sliding_attention": one()}


@st.composite
def sizes(draw) -> dict[str, Any]:
    """Widths and depths that fit together."""
    num_heads = draw(st.sampled_from([1, 2, 3, 4]))
    num_layers = draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([4, 6, 8]))
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": draw(st.sampled_from([12, 24])),
        "intermediate_size": draw(st.sampled_from([10, 16, None])),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, num_heads + 1) if num_heads % n == 0])),
        "head_dim": head_dim,
        "max_position_embeddings": MAX_LENGTH,
        "num_hidden_groups": draw(st.sampled_from([None, 1, num_layers])),
        "embedding_size": draw(st.sampled_from([None, 6])),
    }
    if draw(st.booleans()):
        fields.update(hidden_size=num_heads * head_dim, head_dim=None)
    return fields


@st.composite
def experts(draw, is_causal: bool, num_layers: int, is_shared: bool) -> dict[str, Any]:
    """The fields of the experts of one stack: none in half of the forms."""

    def pick(*values):
        return draw(st.sampled_from(values))

    num_experts = pick(0, 0, 0, 2, 4, 5)
    if num_experts == 0:
        return {"num_experts": 0}
    router_type = pick("softmax_topk", "switch", "sigmoid_bias", *([] if is_causal else ["expert_choice"]))
    per_token = 1 if router_type == "switch" else pick(1, 2, num_experts)
    can_normalise = per_token > 1 and router_type in ("softmax_topk", "sigmoid_bias")
    types = [["sparse"], ["dense", "sparse"], ["sparse", "dense"]]
    has_groups = router_type == "sigmoid_bias" and num_experts == 4 and per_token <= 2
    shared = pick(0, 1, 2)
    return {
        "num_experts": num_experts,
        "mlp_layer_types": pick(None, *(types if num_layers > 1 and not is_shared else types[:1])),
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": pick(None, 6),
        "num_shared_experts": shared,
        "shared_expert_gate": pick(False, True) if shared else False,
        "router_type": router_type,
        "norm_topk_prob": pick(True, False) if can_normalise else None,
        "routed_scaling_factor": 1.0 if router_type == "expert_choice" else pick(1.0, 2.5),
        "router_bias": pick(False, True),
        "n_group": 2 if has_groups else 1,
        "topk_group": pick(1, 2) if has_groups else 1,
        "router_jitter_noise": pick(0.0, 0.1),
        "expert_capacity_factor": pick(None, 0.5, 2.0),
        "experts_layout": pick("fused", "fused", "modulelist"),
    }


def differs_by_head(patterns: list[str]) -> bool:
    """Whether a pattern needs two heads or more."""
    return any(word in pattern for pattern in patterns for word in ("/", "split", "groups"))


def memory_lengths(patterns: list[str], rope: dict[str, Any] | None) -> list[int]:
    """Lengths of a decoder's memory with which a text in pieces is the text in one: none, all of it, or a window's past."""
    if rope is not None and any(isinstance(value, dict) for value in rope.values()):
        return [0]
    is_windows = all(pattern.startswith("sliding_window") for pattern in patterns)
    return [0, MAX_LENGTH, *([max(int(p[-1]) for p in patterns) - 1] if is_windows else [])]


@st.composite
def stacks(draw, is_causal: bool, attends_to_another: bool = False) -> dict[str, Any]:
    """The fields of one stack, every one of them, that do not contradict each other."""

    def pick(*values):
        return draw(st.sampled_from(values))

    fields = draw(sizes())
    # Layers that share weights see alike and are normed alike
    is_shared = fields["num_hidden_groups"] == 1 and fields["num_hidden_layers"] > 1
    patterns = [*PATTERNS, *(DECODER_PATTERNS if is_causal else ENCODER_PATTERNS)]
    if fields["num_attention_heads"] == 1:
        patterns = [pattern for pattern in patterns if not differs_by_head(pattern)]
    position_embedding_type = pick(*POSITIONS)
    norm_type, norm_placement = pick(*NORMS), pick(*PLACEMENTS)
    head_dim = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    fields.update(
        embedding_scale=pick(1.0, 0.5, "sqrt"),
        embedding_norm=pick(False, True),
        type_vocab_size=pick(0, 2),
        tie_word_embeddings=pick(True, False),
        position_embedding_type=position_embedding_type,
        rope_parameters=draw(ropes(head_dim)) if position_embedding_type == "rope" else None,
        relative_attention_num_buckets=pick(4, 8) if is_causal else pick(6, 8),
        relative_attention_max_distance=pick(5, 16),
        position_offset=pick(0, 2),
        axial_shape=pick(None, [6, 4], [3, 9]) if position_embedding_type == "axial" else None,
        axial_dims=None,
        sinusoidal_layout=pick("concatenated", "interleaved"),
        sinusoidal_exponent=pick("2i/d", "2i/(d-2)"),
        norm_type=norm_type,
        norm_eps=pick(1e-6, 1e-3),
        norm_bias=pick(True, False),
        norm_unit_offset=pick(False, True) if norm_type == "rms_norm" else False,
        norm_placement=norm_placement,
        final_norm=pick(None, True, False),
        skip_first_norm=pick(False, True) if norm_placement in ("pre", "sandwich") and not is_shared else False,
        layer_scale_init=pick(None, 0.1),
        parallel_residual=pick(False, True) if norm_placement == "pre" else False,
        attention_bias=pick(False, True, ["q", "v"], ["k"], ["o"]),
        qk_norm=pick(None, "head", "full"),
        attention_scale=pick(None, 1.0, 0.3),
        attn_logit_softcapping=pick(None, 3.0),
        attention_sinks=pick(False, True),
        attention_patterns=pick(*(pattern for pattern in patterns if not is_shared or len(pattern) == 1)),
        hidden_act=pick(*ACTIVATIONS),
        gated_mlp=(is_gated := pick(True, False)),
        glu_limit=pick(None, 0.5) if is_gated else None,
        glu_offset=pick(0.0, 1.0) if is_gated else 0.0,
        mlp_bias=pick(False, True),
        lm_head_transform=pick(False, True),
        lm_head_bias=pick(False, True),
        logit_scale=pick(1.0, 0.5),
        final_logit_softcapping=pick(None, 5.0),
        classifier_pooling=pick(*POOLINGS),
        pooler=False if is_causal else pick(False, True),
        pooler_act=pick("tanh", *ACTIVATIONS),
        classifier_transform=pick(False, True),
        classifier_bias=pick(True, False),
        head_act=pick(None, *ACTIVATIONS),
        head_bias=pick(None, True, False),
        hidden_dropout=pick(0.0, 0.2),
        attention_dropout=pick(0.0, 0.2),
        activation_dropout=pick(0.0, 0.2),
        classifier_dropout=pick(0.0, 0.2),
        layerdrop=pick(0.0, 0.5),
        initializer_range=0.3,
    )
    fields["residual_streams"] = 1
    if norm_placement == "pre" and not fields["parallel_residual"] and not attends_to_another and pick(True, False):
        fields.update(residual_streams=2, tie_word_embeddings=False)
    fields.update(draw(experts(is_causal, fields["num_hidden_layers"], is_shared)))
    lengths = memory_lengths(fields["attention_patterns"], fields["rope_parameters"]) if is_causal else [0]
    fields["memory_length"] = pick(*lengths)
    return fields


@st.composite
def losses(draw) -> dict[str, Any]:
    """The fields of the training loss, which an encoder-decoder keeps beside its stacks."""
    return {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss_coef": draw(st.sampled_from([0.0, 1e-2])),
        "router_aux_loss_coef": draw(st.sampled_from([None, 0.0, 0.1])),
        "router_z_loss_coef": draw(st.sampled_from([0.0, 0.1])),
    }


@st.composite
def forms(draw, *shapes: str) -> Form:
    """A legal form of one of `shapes`, by default of any."""
    shape = draw(st.sampled_from(shapes or ("encoder", "decoder", "encoder_decoder")))
    loss = draw(losses())
    if shape != "encoder_decoder":
        return shape, {**draw(stacks(shape == "decoder")), **loss, **IDS}
    fields = {
        "encoder": draw(stacks(False)),
        "decoder": draw(stacks(True, attends_to_another=True)),
        "tie_word_embeddings": draw(st.booleans()),
        "tie_encoder_decoder_embeddings": draw(st.sampled_from([None, False])),
        "decoder_start_token_id": 1,
    }
    if draw(st.booleans()):
        # The shapes of shared embeddings agree
        for name in ("hidden_size", "embedding_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            fields["decoder"][name] = fields["encoder"][name]
        fields["decoder"]["rope_parameters"] = fields["encoder"]["rope_parameters"]
        if fields["decoder"]["position_embedding_type"] == "rope" and fields["decoder"]["rope_parameters"] is None:
            fields["decoder"]["position_embedding_type"] = "alibi"
        if fields["decoder"]["num_attention_heads"] == 1 and differs_by_head(fields["decoder"]["attention_patterns"]):
            fields["decoder"]["attention_patterns"] = ["full"]
        if memory_lengths(["full"], fields["decoder"]["rope_parameters"]) == [0]:
            fields["decoder"]["memory_length"] = 0
        fields["tie_encoder_decoder_embeddings"] = True
    return shape, {**fields, **loss, **IDS}


@st.composite
def wild_forms(draw) -> Form:
    """A form of one stack whose every field is drawn on its own: legal, illegal, or at odds with another."""
    shape = draw(st.sampled_from(("encoder", "decoder")))
    fields = {**draw(stacks(shape == "decoder")), **draw(losses()), **IDS}
    for name in draw(st.lists(st.sampled_from(sorted(WILD)), min_size=1, max_size=4, unique=True)):
        fields[name] = draw(st.sampled_from(WILD[name]))
    return shape, fields


# Values at and beyond the edge of what each field takes
WILD: dict[str, list[Any]] = {
    "vocab_size": [0, -1, 1, 3, 19],
    "hidden_size": [0, -4, 1, 5, 7, 16],
    "intermediate_size": [0, -1, 1, None],
    "num_hidden_layers": [0, -1, 1, 3],
    "num_attention_heads": [0, -2, 1, 5, 6],
    "num_key_value_heads": [0, -1, 1, 2, 3, 4, 5],
    "head_dim": [0, -1, 1, 2, 3, 5, None],
    "max_position_embeddings": [0, -1, 1, 2, 512],
    "num_hidden_groups": [0, -1, 1, 2, 3, 5],
    "embedding_size": [0, -1, 1, 2, 3, None],
    "embedding_scale": [0.0, -1.0, 2, "sqrt", "root"],
    "embedding_norm": [True, "yes"],
    "type_vocab_size": [-1, 0, 1],
    "position_embedding_type": [*POSITIONS, "rotary", None],
    "rope_parameters": [
        None,
        {},
        {"rope_type": "ntk"},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.3},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 3.0},
        {"rope_type": "linear", "rope_theta": 100.0},
        {"rope_type": "llama3", "rope_theta": 100.0, "factor": 2.0},
        {"rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]},
        {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
        "rope",
    ],
    "relative_attention_num_buckets": [-1, 0, 1, 2, 3, 4, 32],
    "relative_attention_max_distance": [-1, 0, 1, 2, 8],
    "position_offset": [-1, 0, 1],
    "axial_shape": [None, [5, 5], [4, 6], [2, 3], [24], [24, 0], [2, 3, 4], "square"],
    "axial_dims": [None, [6, 6], [3, 3], [1, 1], [0, 12], [-6, 18], [12]],
    "sinusoidal_layout": ["interleaved", "mixed"],
    "sinusoidal_exponent": ["2i/(d-2)", "i/d"],
    "norm_type": [*NORMS, "batch_norm"],
    "norm_eps": [0, -1e-6, 1e-12, 1, "small"],
    "norm_bias": [False, 1],
    "norm_unit_offset": [True, False],
    "norm_placement": [*PLACEMENTS, "inner"],
    "final_norm": [None, True, "no"],
    "skip_first_norm": [True, False],
    "layer_scale_init": [0.0, -1.0, 1, "one"],
    "parallel_residual": [True, False],
    "residual_streams": [-1, 0, 1, 2, 3, None],
    "attention_bias": [True, [], ["q", "k", "v", "o"], ["x"], "q", 1],
    "qk_norm": [None, "head", "full", "both", True],
    "attention_scale": [0.0, -1.0, 2, None],
    "attn_logit_softcapping": [0.0, -1.0, 50, None],
    "attention_sinks": [True, 1],
    "attention_patterns": [
        [],
        ["ful"],
        ["sliding_window"],
        ["sliding_window:0"],
        ["sliding_window:x"],
        ["sliding_window:-1"],
        ["sliding_window:99999"],
        ["sliding_window:2", "sliding_window:3"],
        ["dilated:30"],
        ["dilated:2,gap=1/2/3"],
        ["chunked:1"],
        ["local_global:2,tokens=-1"],
        ["local_global:2,global_projections=true"],
        ["strided:2,heads=split"],
        ["fixed:2,summary=3"],
        ["big_bird:4,placement=first"],
        ["prefix_lm"],
        ["chunked:4,before=1,cyclic=true"],
        ["lsh:4,rounds=0"],
        ["lsh:4,chunked=true,chunk=4"],
        ["lsh:2/3"],
        ["full:2"],
        [{"name": "full"}, {"name": "sliding_window", "window": 2}],
        [{"name": "sliding_window", "window": 2.5}],
        [{"window": 2}],
        [3],
        "full",
        None,
    ],
    "memory_length": [-1, 0, 1, 100, "all", None],
    "hidden_act": [*ACTIVATIONS, "gellu", "", None],
    "gated_mlp": [True, None],
    "glu_limit": [None, 0.0, -1.0, 1, "wide"],
    "glu_offset": [-1.0, 1, None],
    "mlp_bias": [True, "no"],
    "num_experts": [-1, 0, 1, 2, 3, "many", None],
    "mlp_layer_types": [None, [], ["dense"], ["sparse"], ["dense", "sparse"], ["moe"], "sparse"],
    "num_experts_per_tok": [None, 0, -1, 1, 2, 9, "all"],
    "moe_intermediate_size": [None, 0, -1, 1, 8],
    "num_shared_experts": [-1, 0, 1, None],
    "shared_expert_gate": [True, "yes"],
    "router_type": ["softmax_topk", "switch", "sigmoid_bias", "expert_choice", "hash", None],
    "norm_topk_prob": [True, False, None, "yes"],
    "routed_scaling_factor": [0.0, -1.0, 2, "big"],
    "router_bias": [True, "no"],
    "n_group": [0, -1, 1, 2, 3],
    "topk_group": [0, -1, 1, 2, 3],
    "router_bias_update_rate": [-0.1, 0, 0.1],
    "router_jitter_noise": [-0.1, 0.5, 1.0],
    "expert_capacity_factor": [None, 0.0, -1.0, 1, 4.0],
    "expert_capacity": [None, 0, -1, 1, 4],
    "expert_capacity_in_eval": [True, False],
    "router_aux_loss_coef": [None, -0.1, 0, 1],
    "router_z_loss_coef": [-0.1, 0, 1],
    "experts_layout": ["fused", "modulelist", "stacked"],
    "lm_head_transform": [True, 0.5],
    "lm_head_bias": [True, None],
    "logit_scale": [0.0, -1.0, 3, "big"],
    "final_logit_softcapping": [0.0, -1.0, 30, None],
    "classifier_pooling": [*POOLINGS, "max"],
    "pooler": [True, None],
    "pooler_act": [*ACTIVATIONS, "tan", "", None],
    "classifier_transform": [True, None],
    "classifier_bias": [False, 1],
    "head_act": [*ACTIVATIONS, None, "rellu", ""],
    "head_bias": [True, None, "no"],
    "hidden_dropout": [-0.1, 1.0, 1.5, 0.5],
    "attention_dropout": [-0.1, 1, 0.5],
    "activation_dropout": [-0.1, 1.0, 0.5],
    "classifier_dropout": [-0.1, 1.0, 0.5],
    "layerdrop": [-0.1, 1.0, 0.9],
    "label_smoothing": [-0.1, 1.0, 0.9],
    "z_loss_coef": [-0.1, 0, 1],
    "initializer_range": [0.0, -0.1, 1, "wide"],
    "tie_word_embeddings": [True, None],
    "use_cache": [False, "no"],
    "pad_token_id": [-1, 0, 18, 19, None],
    "bos_token_id": [-1, 18, 19, None],
    "eos_token_id": [-1, 18, 19, None, [], [1, 19], [1, 2]],
}


def sample(strategy: st.SearchStrategy, count: int) -> list[Any]:
    """`count` examples of a strategy, the same ones each time, for a test that is too dear to be run on each alone."""
    examples = []

    @settings(max_examples=count, phases=[Phase.generate], derandomize=True, database=None)
    @given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return examples
