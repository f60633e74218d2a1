"""BART (arXiv:1910.13461)."""

from typing import Any

import torch

from ..family import Family, Head
from ..tables import Row

SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "activation_function",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "initializer_range": "init_std",
}
OWN = {
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention_heads",
    "layerdrop": "layerdrop",
}
STACKS = ("encoder", "decoder")
SAME = {f"{side}.{ours}": name for side in STACKS for ours, name in SHARED.items()}
SAME |= {f"{side}.{ours}": f"{side}_{name}" for side in STACKS for ours, name in OWN.items()}
SAME |= {
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_word_embeddings",
    "decoder_start_token_id": "decoder_start_token_id",
}


def in_both(**fields: Any) -> dict[str, Any]:
    """The same fields in both stacks."""
    return {f"{side}.{name}": value for side in STACKS for name, value in fields.items()}


LEARNED = in_both(position_embedding_type="learned", position_offset=2, embedding_norm=True)
FIXED = {
    **in_both(norm_type="layer_norm", norm_eps=1e-5, attention_bias=True, gated_mlp=False, mlp_bias=True),
    "decoder.lm_head_bias": True,
}
POST_NORM = in_both(norm_placement="post")


def read(foreign) -> dict[str, Any]:
    scale = "sqrt" if foreign.scale_embedding else 1.0
    return {"tie_encoder_decoder_embeddings": foreign.tie_word_embeddings, **in_both(embedding_scale=scale)}


def write(form) -> dict[str, Any]:
    return {"scale_embedding": form.encoder.embedding_scale != 1.0}


def zeros(foreign) -> torch.Tensor:
    """The bias of the logits in a checkpoint that does not mention it."""
    return torch.zeros(1, getattr(foreign, "decoder_vocab_size", foreign.vocab_size))


def rows(form) -> list[Row]:
    norm = "output_norm" if form.encoder.norm_placement == "post" else "input_norm"
    is_learned = form.encoder.position_embedding_type == "learned"
    layer = "{side}.layers.{i}"
    return [
        Row("{side}.embed_tokens.weight", "{side}.embed_tokens.weight"),
        *([Row("{side}.embed_positions.weight", "{side}.embeddings.positions.weight")] if is_learned else []),
        Row("{side}.layernorm_embedding.{p}", "{side}.embeddings.norm.{p}"),
        Row(f"{layer}.self_attn.{{qkv}}_proj.{{p}}", f"{layer}.self_attn.{{qkv}}_proj.{{p}}"),
        Row(f"{layer}.self_attn.out_proj.{{p}}", f"{layer}.self_attn.o_proj.{{p}}"),
        Row(f"{layer}.self_attn_layer_norm.{{p}}", f"{layer}.attention_residual.{norm}.{{p}}"),
        Row(f"{layer}.encoder_attn.{{qkv}}_proj.{{p}}", f"{layer}.cross_attn.{{qkv}}_proj.{{p}}"),
        Row(f"{layer}.encoder_attn.out_proj.{{p}}", f"{layer}.cross_attn.o_proj.{{p}}"),
        Row(f"{layer}.encoder_attn_layer_norm.{{p}}", f"{layer}.cross_residual.{norm}.{{p}}"),
        Row(f"{layer}.fc1.{{p}}", f"{layer}.mlp.up_proj.{{p}}"),
        Row(f"{layer}.fc2.{{p}}", f"{layer}.mlp.down_proj.{{p}}"),
        Row(f"{layer}.final_layer_norm.{{p}}", f"{layer}.mlp_residual.{norm}.{{p}}"),
        Row("{side}.layer_norm.{p}", "{side}.norm.{p}"),
    ]


LANGUAGE_MODEL = [
    Row("lm_head.weight", "lm_head.weight"),
    Row("final_logits_bias", "lm_head.bias", ("squeeze",)),
]

FAMILY = Family(
    model_type="bart",
    shape="variform_encoder_decoder",
    same=SAME,
    fixed=FIXED | LEARNED | POST_NORM,
    read=read,
    write=write,
    inert=frozenset({"forced_eos_token_id", "classifier_dropout"}),
    rows=rows,
    prefix="model.",
    heads={
        "AutoModel": Head("BartModel"),
        "AutoModelForSeq2SeqLM": Head("BartForConditionalGeneration", LANGUAGE_MODEL),
    },
    computed={"final_logits_bias": zeros},
    idle={"shared.weight": "encoder.embed_tokens.weight"},
)
