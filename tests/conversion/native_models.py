"""Random models of transformers' own classes: what they may vary, drawn from a seed. Tiny, without dropout."""

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from variform.model.lsh import rotations
from variform.model.sparse_patterns import Lsh

WEIGHT_STD = 0.2  # ten times wider than models start with, so that no part is too small to be seen
FIRST_REGULAR_ID = 5
SALT = 174  # the first four seeds give every switch both values
LONGEST = 22  # tokens that every one of these models takes
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh")
EPSILONS = (1e-12, 1e-6, 1e-5, 1e-3, 0.1)
# Which native classes give a token its slot as position, without a way to say otherwise
COUNT_SLOTS = ("bart", "pegasus", "marian", "led")
# Whose first position is the row after the padding id's
OFFSET_BY_PADDING = ("roberta", "longformer")
# Which take a `global_attention_mask`
TAKE_MARKS = ("longformer", "led")
# Families that are the other shape of one, and that one's name
OTHER_SHAPES = {"reformer_encoder": "reformer"}
# Which rope types turn faster as the text grows: keys in a cache keep the angle of their time
GROWING_ROPES = ("dynamic", "longrope")


def random_fields(model_type: str, seed: int) -> dict[str, Any]:
    """What is drawn for a config, under its native names; the same for the same seed."""
    rng = random.Random(f"{SALT} {model_type} {seed}")
    pad, bos, eos = rng.sample(range(FIRST_REGULAR_ID), 3)
    problems = [None, "single_label_classification", "multi_label_classification", "regression"]
    fields = DRAW[model_type](rng) | {
        "vocab_size": rng.randint(43, 61),
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "num_labels": rng.choice([2, 3, 5]),
        "problem_type": rng.choice(problems),
    }
    if model_type in OFFSET_BY_PADDING:
        # The rows of its table up to the padding's hold no position
        fields["max_position_embeddings"] += pad + 1
    return fields


def random_config(model_type: str, seed: int) -> PreTrainedConfig:
    """The config of one family, the same for the same seed."""
    return config_class(model_type)(**random_fields(model_type, seed))


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The native config class of a family."""
    return hf.CONFIG_MAPPING[OTHER_SHAPES.get(model_type, model_type)]


def hash_as_ours(monkeypatch) -> None:
    """Gives Reformer's class the random numbers that ours hashes with."""
    hash_vectors = LSHSelfAttention._hash_vectors

    def with_our_numbers(self, vectors, num_hashes, *args, **kwargs):
        buckets = self.num_buckets if isinstance(self.num_buckets, int) else tuple(self.num_buckets)
        pattern = Lsh(buckets, rounds=num_hashes, seed=self.hash_seed)

        def randn(shape, **options):
            return rotations(pattern, self.layer_idx, *shape[:2]).to(**options)

        with mock.patch.object(torch, "randn", randn):
            return hash_vectors(self, vectors, num_hashes, *args, **kwargs)

    monkeypatch.setattr(LSHSelfAttention, "_hash_vectors", with_our_numbers)


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model in evaluation mode with random weights, every tensor of it moved off its start."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the default wants widths that are multiples of 4
    if config.model_type in ("t5", "mt5", "switch_transformers") and hasattr(model, "lm_head") and seed % 2:
        # T5's config ties the head whatever it is told; a checkpoint with a head of its own unties it
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # Some classes give the padding's row no gradient, even Pegasus and Marian, which start every text with
            # that token; T5 trains it, and so does the family
            module.padding_idx = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(mean=float(is_norm), std=WEIGHT_STD)
    if hasattr(model, "final_logits_bias"):
        # A constant that its class adds to the logits, where the family has a bias to train
        model.final_logits_bias.normal_().requires_grad_()
    return model


def sizes(rng: random.Random, head_dims: tuple[int, ...] = (3, 4, 5, 6)) -> dict[str, int]:
    """Widths and depths of a stack whose heads share its width, under BERT's names."""
    heads = rng.choice([1, 2, 3, 5])
    widening = 3 if heads == 1 else 1  # a few units that all rest leave no gradient to compare
    return {
        "hidden_size": heads * rng.choice(head_dims) * widening,
        "intermediate_size": rng.randint(9, 37),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "max_position_embeddings": rng.randint(LONGEST, 31),
    }


def bert(rng: random.Random) -> dict[str, Any]:
    return sizes(rng) | {
        "type_vocab_size": rng.choice([1, 2, 3]),
        "layer_norm_eps": rng.choice(EPSILONS),
        "hidden_act": rng.choice(ACTIVATIONS),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": rng.choice([True, True, False]),
        "initializer_range": rng.choice([0.02, 0.1]),
    }


def albert(rng: random.Random) -> dict[str, Any]:
    layers, groups = rng.choice([(2, 1), (2, 2), (4, 2), (3, 1), (4, 4)])
    return bert(rng) | {
        "num_hidden_layers": layers,
        "num_hidden_groups": groups,
        "embedding_size": rng.choice([5, 7, 11]),
        "classifier_dropout_prob": 0.0,
    }


def attention_window(rng: random.Random, layers: int) -> int | list[int]:
    """Windows of both sides together, one for all layers or one each, of which the widest must be a multiple."""
    each = [rng.choice([4, 8]) for _ in range(layers)]
    return rng.choice([each, each, rng.choice([4, 6, 8])])


def longformer(rng: random.Random) -> dict[str, Any]:
    fields = bert(rng) | {"tie_word_embeddings": rng.choice([True, True, False])}
    return fields | {"attention_window": attention_window(rng, fields["num_hidden_layers"])}


def big_bird(rng: random.Random) -> dict[str, Any]:
    """Texts up to (5 + 2 * num_random_blocks) * block_size tokens, 14 to 55 of them, are seen whole."""
    return bert(rng) | {
        "num_random_blocks": rng.choice([1, 2, 3]),
        "attention_type": rng.choice(["block_sparse", "block_sparse", "block_sparse", "original_full"]),
        "use_bias": rng.choice([True, False]),
        "rescale_embeddings": rng.choice([True, False]),
        "block_size": rng.choice([2, 3, 4, 5]),
        "max_position_embeddings": rng.randint(70, 80),
    }


def distilbert(rng: random.Random) -> dict[str, Any]:
    size = sizes(rng)
    return {
        "dim": size["hidden_size"],
        "hidden_dim": size["intermediate_size"],
        "n_layers": size["num_hidden_layers"],
        "n_heads": size["num_attention_heads"],
        "max_position_embeddings": size["max_position_embeddings"],
        "activation": rng.choice(ACTIVATIONS),
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
        "qa_dropout": 0.0,
        "tie_word_embeddings": rng.choice([True, True, False]),
    }


def rope(rng: random.Random, head_dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """Rope parameters of any type."""
    names = ["default", "default", "linear", "yarn", "llama3", "longrope"]
    names += ["dynamic"] if head_dim > 2 else []  # undefined for a single pair
    names += ["proportional"] if head_dim % 4 == 0 else []  # turns half of the pairs
    name = rng.choice(names)
    parameters = {"rope_type": name, "rope_theta": rng.choice([10.0, 500.0, 10000.0])}
    if name == "proportional":
        return parameters | {"partial_rotary_factor": 0.5}
    if name == "default":
        return parameters
    parameters["factor"] = rng.choice([2.0, 4.0])
    if name in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = max_position_embeddings // 2
    if name == "yarn":
        parameters |= rng.choice([{}, {"attention_factor": 1.3}, {"beta_fast": 16.0, "beta_slow": 2.0}])
    if name == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if name == "longrope":
        parameters["short_factor"] = [1.0 + 0.5 * i for i in range(head_dim // 2)]
        parameters["long_factor"] = [2.0 + 0.5 * i for i in range(head_dim // 2)]
    return parameters


def decoder(rng: random.Random) -> dict[str, Any]:
    """What Llama and its relatives have in common: grouped heads of a free width."""
    groups = rng.choice([(1, 1), (3, 1), (5, 5), (6, 2), (6, 3), (4, 2)])
    head_dim = rng.choice([2, 4, 6, 10])
    length = rng.choice([10, 20, 64])  # texts of 13 tokens reach beyond the first, and beyond half of the second
    return {
        "hidden_size": groups[0] * rng.choice([3, 4, 5]),
        "intermediate_size": rng.randint(9, 37),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "num_attention_heads": groups[0],
        "num_key_value_heads": groups[1],
        "head_dim": head_dim,
        "hidden_act": rng.choice(ACTIVATIONS),
        "max_position_embeddings": length,
        "rope_parameters": rope(rng, head_dim, length),
        "rms_norm_eps": rng.choice(EPSILONS),
        "tie_word_embeddings": rng.choice([True, False]),
        "initializer_range": rng.choice([0.02, 0.1]),
        # Unnamed in their configs; token classifiers read it
        "classifier_dropout": 0.0,
    }


def llama(rng: random.Random) -> dict[str, Any]:
    return decoder(rng) | {"attention_bias": rng.choice([True, False]), "mlp_bias": rng.choice([True, False])}


def mistral(rng: random.Random) -> dict[str, Any]:
    return decoder(rng) | {"sliding_window": rng.choice([None, 3, 7])}


def experts(rng: random.Random) -> dict[str, Any]:
    """Of a router and its experts; without jitter, which is drawn from another stream natively."""
    num_experts = rng.choice([3, 4, 5])
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": rng.choice([2, 3]),
        "router_aux_loss_coef": rng.choice([0.001, 0.02]),
    }


def mixtral(rng: random.Random) -> dict[str, Any]:
    fields = mistral(rng) | experts(rng)
    return fields | {"num_local_experts": fields.pop("num_experts")}


def windows(rng: random.Random, layers: int) -> dict[str, Any]:
    """A pattern a layer, regular or not."""
    return {
        "sliding_window": rng.choice([3, 4, 7]),
        "layer_types": [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)],
    }


def qwen3(rng: random.Random) -> dict[str, Any]:
    fields = decoder(rng) | {"attention_bias": rng.choice([True, False])}
    if rng.choice([True, False]):
        fields |= windows(rng, fields["num_hidden_layers"]) | {"use_sliding_window": True}
    return fields


def qwen2(rng: random.Random) -> dict[str, Any]:
    fields = qwen3(rng)
    del fields["attention_bias"]
    if rng.choice([True, False]):
        # Its config does not declare the width of a head, and its layers heed it
        fields["hidden_size"] = fields["num_attention_heads"] * fields.pop("head_dim")
    return fields


def sparse_layers(rng: random.Random, layers: int) -> dict[str, Any]:
    """Experts in some layers: in one at least."""
    step = rng.choice([1, 2])
    dense = rng.sample(range(layers), rng.choice([0, 1]))
    if not [layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense]:
        dense = []
    return {"decoder_sparse_step": step, "mlp_only_layers": dense, "moe_intermediate_size": rng.randint(5, 15)}


def qwen3_moe(rng: random.Random) -> dict[str, Any]:
    fields = qwen3(rng) | experts(rng) | {"norm_topk_prob": rng.choice([True, False])}
    fields |= {"tie_word_embeddings": rng.choice([True, False, False])}
    fields |= sparse_layers(rng, fields["num_hidden_layers"])
    fields.pop("layer_types", None)
    if rng.choice([True, False]):
        # Not declared, and read
        fields["hidden_size"] = fields["num_attention_heads"] * fields.pop("head_dim")
    return fields


def qwen2_moe(rng: random.Random) -> dict[str, Any]:
    fields = qwen2(rng) | experts(rng) | {"norm_topk_prob": rng.choice([True, False])}
    fields |= sparse_layers(rng, fields["num_hidden_layers"])
    shared = rng.choice([1, 2, 3]) * fields["moe_intermediate_size"]
    return fields | {"shared_expert_intermediate_size": shared, "qkv_bias": rng.choice([True, False])}


def olmoe(rng: random.Random) -> dict[str, Any]:
    fields = llama(rng) | experts(rng) | {"norm_topk_prob": rng.choice([True, False])}
    del fields["mlp_bias"]
    fields["hidden_size"] = fields["num_attention_heads"] * fields.pop("head_dim")
    return fields


def gpt_oss(rng: random.Random) -> dict[str, Any]:
    """With limits that many of the random gates are beyond; its class passes over `hidden_act`."""
    fields = decoder(rng) | experts(rng) | {"attention_bias": rng.choice([True, False])}
    if rng.choice([True, False]):
        fields["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": rng.choice([500.0, 150000.0]),
            "factor": 4.0,
            "original_max_position_embeddings": fields["max_position_embeddings"] // 2,
            "truncate": False,
        }
    fields |= windows(rng, fields["num_hidden_layers"]) | {"swiglu_limit": rng.choice([0.1, 0.4, 7.0])}
    return fields | {"num_local_experts": fields.pop("num_experts")}


def gemma2(rng: random.Random) -> dict[str, Any]:
    fields = decoder(rng)
    fields["hidden_activation"] = fields.pop("hidden_act")
    return fields | {
        **windows(rng, fields["num_hidden_layers"]),
        "attention_bias": rng.choice([True, False]),
        "query_pre_attn_scalar": rng.choice([3, 7, 16]),
        "attn_logit_softcapping": rng.choice([None, 2.0, 50.0]),
        "final_logit_softcapping": rng.choice([None, 3.0, 30.0]),
    }


def gemma3_text(rng: random.Random) -> dict[str, Any]:
    fields = gemma2(rng)
    head_dim, length = fields["head_dim"], fields["max_position_embeddings"]
    ropes = {name: rope(rng, head_dim, length) for name in ("full_attention", "sliding_attention")}
    return fields | {"rope_parameters": ropes}


def modernbert(rng: random.Random) -> dict[str, Any]:
    size = sizes(rng, head_dims=(4, 6, 8))
    head_dim, length = size["hidden_size"] // size["num_attention_heads"], size["max_position_embeddings"]
    biases = ("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias")
    return size | {
        "hidden_activation": rng.choice(ACTIVATIONS),
        "classifier_activation": rng.choice(ACTIVATIONS),
        "classifier_pooling": rng.choice(["cls", "mean"]),
        "norm_eps": rng.choice(EPSILONS),
        "local_attention": rng.choice([4, 6, 12]),
        "layer_types": windows(rng, size["num_hidden_layers"])["layer_types"],
        "rope_parameters": {name: rope(rng, head_dim, length) for name in ("full_attention", "sliding_attention")},
        "tie_word_embeddings": rng.choice([True, True, False]),
        **{name: rng.choice([True, False]) for name in biases},
    }


def gpt2(rng: random.Random) -> dict[str, Any]:
    size = sizes(rng)
    return {
        "n_embd": size["hidden_size"],
        "n_inner": rng.choice([None, size["intermediate_size"]]),
        "n_layer": size["num_hidden_layers"],
        "n_head": size["num_attention_heads"],
        "n_positions": size["max_position_embeddings"],
        "activation_function": rng.choice(ACTIVATIONS),
        "layer_norm_epsilon": rng.choice(EPSILONS),
        "scale_attn_weights": rng.choice([True, True, False]),
        "reorder_and_upcast_attn": rng.choice([True, False]),
        "tie_word_embeddings": rng.choice([True, False]),
        "classifier_dropout": 0.0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def mt5(rng: random.Random) -> dict[str, Any]:
    return {
        "d_model": rng.randint(9, 25),
        "d_kv": rng.choice([3, 5, 6]),
        "d_ff": rng.randint(9, 37),
        "num_layers": rng.choice([2, 3]),
        "num_decoder_layers": rng.choice([2, 3]),
        "num_heads": rng.choice([1, 3, 4]),
        "relative_attention_num_buckets": rng.choice([4, 8, 10]),
        "relative_attention_max_distance": rng.choice([6, 9, 128]),
        "layer_norm_epsilon": rng.choice(EPSILONS),
        "feed_forward_proj": rng.choice(["relu", "gelu", "silu", "gated-gelu", "gated-silu", "gated-relu"]),
        "decoder_start_token_id": rng.randrange(FIRST_REGULAR_ID),
        "dropout_rate": 0.0,
    }


def t5(rng: random.Random) -> dict[str, Any]:
    # In this family the field says whether the states are scaled before the head
    return mt5(rng) | {"tie_word_embeddings": rng.choice([True, False])}


def switch_transformers(rng: random.Random) -> dict[str, Any]:
    """With room for all texts in each expert, and without jitter, which is drawn from another stream natively."""
    fields = t5(rng)
    act = fields.pop("feed_forward_proj").removeprefix("gated-")
    return fields | {
        "dense_act_fn": act,
        "num_experts": rng.choice([2, 3, 4]),
        "expert_capacity": rng.randint(LONGEST, 64),
        # More than there are layers: none is sparse
        "num_sparse_encoder_layers": rng.choice([1, fields["num_layers"]]),
        "num_sparse_decoder_layers": rng.choice([0, 1, 2, 9]),
        "router_jitter_noise": 0.0,
        "router_z_loss_coef": rng.choice([0.0, 0.002]),
        "router_aux_loss_coef": rng.choice([0.001, 0.02]),
        "router_bias": rng.choice([True, False]),
    }


def bart(rng: random.Random) -> dict[str, Any]:
    fields = {
        "d_model": rng.choice([12, 24]),
        "max_position_embeddings": rng.randint(LONGEST, 31),
        "activation_function": rng.choice(ACTIVATIONS),
        "scale_embedding": rng.choice([True, False]),
        "tie_word_embeddings": rng.choice([True, True, False]),
        "decoder_start_token_id": rng.randrange(FIRST_REGULAR_ID),
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    }
    for side in ("encoder", "decoder"):
        fields[f"{side}_layers"] = rng.choice([2, 3])
        fields[f"{side}_attention_heads"] = rng.choice([1, 3, 4])
        fields[f"{side}_ffn_dim"] = rng.randint(9, 37)
    return fields


def led(rng: random.Random) -> dict[str, Any]:
    fields = bart(rng)
    del fields["scale_embedding"]
    length = fields.pop("max_position_embeddings")
    return fields | {
        # Its class fills texts up to a multiple of the widest window, and the filling has positions too
        "max_encoder_position_embeddings": length + 8,
        "max_decoder_position_embeddings": length,
        "attention_window": attention_window(rng, fields["encoder_layers"]),
    }


def marian(rng: random.Random) -> dict[str, Any]:
    fields = bart(rng)
    if rng.choice([True, False]):
        fields |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": rng.randint(31, 42)}
    return fields


def reformer(rng: random.Random) -> dict[str, Any]:
    """Texts are of 24 tokens, a whole number of chunks of both kinds and, in training, all that axial positions hold."""
    hidden_size = rng.choice([12, 16, 20])
    rows = rng.choice([4, 6, 8])
    first = rng.choice([3, 5, 6])
    return {
        "is_decoder": True,
        "hidden_size": hidden_size,
        "feed_forward_size": rng.randint(9, 37),
        "num_attention_heads": rng.choice([1, 2, 3]),
        "attention_head_size": rng.choice([4, 5, 6]),
        "attn_layers": rng.choice([["local", "lsh"], ["lsh"], ["local", "local"], ["lsh", "local", "lsh"]]),
        "axial_pos_embds": rng.choice([True, False]),
        "axial_pos_shape": [rows, 24 // rows],
        "axial_pos_embds_dim": [first, hidden_size - first],
        "max_position_embeddings": 24,
        "local_attn_chunk_length": rng.choice([3, 4, 6, 24]),
        "local_num_chunks_before": rng.choice([0, 1, 1]),
        "lsh_attn_chunk_length": rng.choice([2, 4, 6]),
        "num_buckets": rng.choice([2, 4, 8, [2, 4]]),
        "num_hashes": rng.choice([1, 1, 2, 3]),
        "hash_seed": rng.randrange(9),
        "layer_norm_eps": rng.choice(EPSILONS),
        "hidden_act": rng.choice(ACTIVATIONS),
        "initializer_range": rng.choice([0.02, 0.1]),
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
    }


def reformer_encoder(rng: random.Random) -> dict[str, Any]:
    return reformer(rng) | {"is_decoder": False}


DRAW: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "bert": bert,
    "roberta": bert,
    "distilbert": distilbert,
    "albert": albert,
    "modernbert": modernbert,
    "longformer": longformer,
    "big_bird": big_bird,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "t5": t5,
    "mt5": mt5,
    "switch_transformers": switch_transformers,
    "bart": bart,
    "led": led,
    "pegasus": bart,
    "marian": marian,
    "reformer": reformer,
    "reformer_encoder": reformer_encoder,
}
