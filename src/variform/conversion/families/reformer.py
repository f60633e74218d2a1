"""Reformer (arXiv:2001.04451): two residual streams, chunks, and tokens that are sorted by hash. Here the decoder, which is not
all of the family: what sees both ways is `reformer_encoder`.

The native class hashes with random numbers, of `hash_seed` or anew in each call; ours has numbers of its own, of the same
seed. And it cuts the padded batch into chunks, in a whole number of both kinds, where ours cuts each text.
"""

from typing import Any

from ..family import Family, Head, without_repeats
from ..tables import Row

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "feed_forward_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "attention_head_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "initializer_range": "initializer_range",
}
FIXED: dict[str, Any] = {
    "residual_streams": 2,
    "norm_type": "layer_norm",
    "gated_mlp": False,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


def read(foreign) -> dict[str, Any]:
    patterns = [read_layer(foreign, kind) for kind in foreign.attn_layers]
    values = {"num_hidden_layers": len(patterns), "attention_patterns": without_repeats(patterns)}
    if foreign.axial_pos_embds:
        shape, dims = list(foreign.axial_pos_shape), list(foreign.axial_pos_embds_dim)
        values |= {"position_embedding_type": "axial", "axial_shape": shape, "axial_dims": dims}
    else:
        values["position_embedding_type"] = "learned"
    kind = "local" if "local" in foreign.attn_layers else "lsh"
    values["attention_dropout"] = getattr(foreign, f"{kind}_attention_probs_dropout_prob")
    dropout = foreign.classifier_dropout
    values["classifier_dropout"] = foreign.hidden_dropout_prob if dropout is None else dropout
    if foreign.is_decoder and "lsh" in foreign.attn_layers:
        values["use_cache"] = False  # each token sorts the text anew: what the native cache computes is something else
    return values


def read_layer(foreign, kind: str) -> str:
    """Our pattern of a "local" or an "lsh" layer. A native chunk may reach beyond the longest text."""
    longest = foreign.max_position_embeddings
    if kind == "local":
        if foreign.local_num_chunks_before > 1:
            raise ValueError(
                f"reformer: Variform does not carry `local_num_chunks_before={foreign.local_num_chunks_before}`, only 0 and 1: "
                "of texts of fewer chunks, the native class counts keys several times."
            )
        size = min(foreign.local_attn_chunk_length, longest)
        before = min(foreign.local_num_chunks_before, (longest - 1) // size)
        cyclic = str(before > 0 and not foreign.is_decoder).lower()
        return f"chunked:{size},before={before},cyclic={cyclic}"
    if foreign.num_buckets is None:
        raise ValueError(
            "reformer: `num_buckets=None` leaves the number to the length of the first text; set it, to an even number."
        )
    buckets = foreign.num_buckets if isinstance(foreign.num_buckets, int) else "/".join(map(str, foreign.num_buckets))
    chunk, seed = min(foreign.lsh_attn_chunk_length, longest), foreign.hash_seed or 0
    return f"lsh:{buckets},rounds={foreign.num_hashes},chunked=true,chunk={chunk},seed={seed}"


def write(form) -> dict[str, Any]:
    patterns = [form.pattern_of(layer) for layer in range(form.num_hidden_layers)]
    values = {
        "attn_layers": ["lsh" if pattern.name == "lsh" else "local" for pattern in patterns],
        "is_decoder": form.is_causal_stack,
        "axial_pos_embds": form.position_embedding_type == "axial",
        "local_attention_probs_dropout_prob": float(form.attention_dropout),
        "lsh_attention_probs_dropout_prob": float(form.attention_dropout),
        "classifier_dropout": form.classifier_dropout,
    }
    if form.position_embedding_type == "axial":
        values |= {"axial_pos_shape": form.axial_shape, "axial_pos_embds_dim": form.axial_dims}
    for pattern in reversed(patterns):
        if pattern.name == "lsh":
            buckets = pattern.buckets if isinstance(pattern.buckets, int) else list(pattern.buckets)
            values |= {"num_buckets": buckets, "num_hashes": pattern.rounds, "hash_seed": pattern.seed}
            values["lsh_attn_chunk_length"] = pattern.chunk
        else:
            # What is not cut into chunks is refused when it is compared
            values["local_attn_chunk_length"] = getattr(pattern, "size", form.max_position_embeddings)
            values["local_num_chunks_before"] = getattr(pattern, "before", 0)
    return values


def rows(form) -> list[Row]:
    positions = "embeddings.position_embeddings"
    table = []
    for number in range(form.num_hidden_layers):
        native, ours = f"encoder.layers.{number}.attention.self_attention", f"layers.{number}.self_attn"
        if form.pattern_of(number).name == "lsh":
            table.append(Row(f"{native}.query_key.weight", f"{ours}.q_proj.weight"))
        else:
            table += [Row(f"{native}.{name}.weight", f"{ours}.{name[0]}_proj.weight") for name in ("query", "key")]
    layer, ours = "encoder.layers.{i}", "layers.{i}"
    return [
        *table,
        Row("embeddings.word_embeddings.weight", "embed_tokens.weight"),
        Row(f"{positions}.embedding.weight", "embeddings.positions.weight"),
        Row(f"{positions}.weights.0", "embeddings.positions.rows", ("squeeze_second",)),
        Row(f"{positions}.weights.1", "embeddings.positions.columns", ("squeeze",)),
        Row(f"{layer}.attention.layer_norm.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}"),
        Row(f"{layer}.attention.self_attention.value.weight", f"{ours}.self_attn.v_proj.weight"),
        Row(f"{layer}.attention.output.dense.weight", f"{ours}.self_attn.o_proj.weight"),
        Row(f"{layer}.feed_forward.layer_norm.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}"),
        Row(f"{layer}.feed_forward.dense.dense.{{p}}", f"{ours}.mlp.up_proj.{{p}}"),
        Row(f"{layer}.feed_forward.output.dense.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        Row("encoder.layer_norm.{p}", "norm.{p}"),
    ]


DIFFERS = (
    "hashes with random numbers of its own and cuts the padded batch into chunks; here, `seed` gives the numbers and each text "
    "is cut."
)
LANGUAGE_MODEL = [Row("lm_head.decoder.weight", "lm_head.weight")]
# The bias of the native language-model heads is never added
UNREAD = ("lm_head.bias",)

FAMILY = Family(
    model_type="reformer",
    shape="variform_decoder",
    takes=lambda foreign: foreign.is_decoder,
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    # Of chunks and hashes the patterns say all that a text can show, in layers that have them
    inert=frozenset(
        [
            "attn_layers",
            "local_attn_chunk_length",
            "local_num_chunks_before",
            "lsh_attn_chunk_length",
            "num_buckets",
            "num_hashes",
            "hash_seed",
            "axial_pos_shape",
            "axial_pos_embds_dim",
            "axial_norm_std",
            "chunk_size_lm_head",
            "tie_word_embeddings",
        ]
    ),
    in_training=frozenset(["local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob"]),
    rows=rows,
    prefix="reformer.",
    heads={
        "AutoModel": Head("ReformerModel", differs=DIFFERS),
        "AutoModelForCausalLM": Head("ReformerModelWithLMHead", LANGUAGE_MODEL, unread=UNREAD, differs=DIFFERS),
    },
)
