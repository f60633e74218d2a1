"""T5, version 1.0 (arXiv:1910.10683) and 1.1 (gated, without a scale before the head)."""

from typing import Any

from ..family import Family, Head
from ..tables import Row
from .bart import STACKS, in_both

SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "hidden_dropout": "dropout_rate",
    "attention_dropout": "dropout_rate",
    "activation_dropout": "dropout_rate",
}
SAME = {f"{side}.{ours}": name for side in STACKS for ours, name in SHARED.items()}
SAME |= {"encoder.num_hidden_layers": "num_layers", "decoder.num_hidden_layers": "num_decoder_layers"}
FIXED = {
    **in_both(position_embedding_type="relative_bias", attention_scale=1.0),
    "tie_encoder_decoder_embeddings": True,
}


def read_start(foreign) -> dict[str, Any]:
    start = getattr(foreign, "decoder_start_token_id", None)
    return {"decoder_start_token_id": foreign.pad_token_id if start is None else start}


def read_unscaled(foreign) -> dict[str, Any]:
    return read_start(foreign) | in_both(hidden_act=foreign.dense_act_fn, gated_mlp=foreign.is_gated_act)


def read(foreign) -> dict[str, Any]:
    # `tie_word_embeddings` of this config is always True; whether the head is scaled stands in a field of its own
    scale = foreign.d_model**-0.5 if foreign.scale_decoder_outputs else 1.0
    return read_unscaled(foreign) | {"decoder.logit_scale": scale}


def write_unscaled(form) -> dict[str, Any]:
    # "gelu" is the tanh approximation where it is gated
    gated = {"gelu_new": "gated-gelu"}.get(form.encoder.hidden_act, f"gated-{form.encoder.hidden_act}")
    return {
        "feed_forward_proj": gated if form.encoder.gated_mlp else form.encoder.hidden_act,
        "decoder_start_token_id": form.decoder_start_token_id,
    }


def write(form) -> dict[str, Any]:
    return write_unscaled(form) | {"tie_word_embeddings": form.decoder.logit_scale != 1.0}


def rows(form) -> list[Row]:
    layer, ours = "{side}.block.{i}.layer", "{side}.layers.{i}"
    cross, our_cross = "decoder.block.{i}.layer.1", "decoder.layers.{i}.cross"
    table = [
        Row("{side}.embed_tokens.weight", "{side}.embed_tokens.weight"),
        Row("{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "{side}.position_bias.weight"),
        Row(f"{layer}.0.SelfAttention.{{qkv}}.weight", f"{ours}.self_attn.{{qkv}}_proj.weight"),
        Row(f"{layer}.0.SelfAttention.o.weight", f"{ours}.self_attn.o_proj.weight"),
        Row(f"{layer}.0.layer_norm.weight", f"{ours}.attention_residual.input_norm.weight"),
        Row(f"{cross}.EncDecAttention.{{qkv}}.weight", f"{our_cross}_attn.{{qkv}}_proj.weight"),
        Row(f"{cross}.EncDecAttention.o.weight", f"{our_cross}_attn.o_proj.weight"),
        Row(f"{cross}.layer_norm.weight", f"{our_cross}_residual.input_norm.weight"),
        Row("{side}.final_layer_norm.weight", "{side}.norm.weight"),
    ]
    inner = {"gate_proj": "wi_0", "up_proj": "wi_1"} if form.encoder.gated_mlp else {"up_proj": "wi"}
    for side, index in (("encoder", 1), ("decoder", 2)):
        foreign, ours = f"{side}.block.{{i}}.layer.{index}", f"{side}.layers.{{i}}"
        table.append(Row(f"{foreign}.layer_norm.weight", f"{ours}.mlp_residual.input_norm.weight"))
        for name, foreign_name in (inner | {"down_proj": "wo"}).items():
            table.append(Row(f"{foreign}.DenseReluDense.{foreign_name}.weight", f"{ours}.mlp.{name}.weight"))
    # The decoder's second layer is cross-attention: its rows come before those that fit any side
    return sorted(table, key=lambda row: "{side}" in row.foreign)


FAMILY = Family(
    model_type="t5",
    shape="variform_encoder_decoder",
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    by_weights=("tie_word_embeddings",),
    inert=frozenset({"initializer_factor", "classifier_dropout"}),
    rows=rows,
    prefix="",
    heads={
        "AutoModel": Head("T5Model"),
        "AutoModelForSeq2SeqLM": Head("T5ForConditionalGeneration", [Row("lm_head.weight", "lm_head.weight")]),
    },
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
