"""GPT-2 (Radford et al., 2019). Its matrices are stored as (in, out), queries, keys and values in one."""

from typing import Any

from ..family import Family, Head
from ..tables import Row

SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "hidden_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIXED: dict[str, Any] = {
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "attention_bias": True,
    "gated_mlp": False,
    "mlp_bias": True,
}


def read(foreign) -> dict[str, Any]:
    # What a token classifier drops out where its config does not say
    dropout = getattr(foreign, "classifier_dropout", None)
    return {
        "intermediate_size": foreign.n_inner or 4 * foreign.n_embd,
        "attention_scale": None if foreign.scale_attn_weights else 1.0,
        "classifier_dropout": 0.1 if dropout is None else dropout,
    }


def write(form) -> dict[str, Any]:
    values = {
        "n_inner": form.intermediate_size,
        "scale_attn_weights": form.attention_scale != 1.0,
        "embd_pdrop": form.hidden_dropout,
    }
    return values if form.classifier_dropout == 0.1 else values | {"classifier_dropout": form.classifier_dropout}


def rows(form) -> list[Row]:
    layer, ours = "h.{i}", "layers.{i}"
    weights, biases = (tuple(f"{ours}.self_attn.{name}_proj.{p}" for name in "qkv") for p in ("weight", "bias"))
    return [
        Row("wte.weight", "embed_tokens.weight"),
        Row("wpe.weight", "embeddings.positions.weight"),
        Row(f"{layer}.ln_1.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}"),
        Row(f"{layer}.attn.c_attn.weight", weights, ("transpose", "split")),
        Row(f"{layer}.attn.c_attn.bias", biases, ("split",)),
        Row(f"{layer}.attn.c_proj.weight", f"{ours}.self_attn.o_proj.weight", ("transpose",)),
        Row(f"{layer}.attn.c_proj.bias", f"{ours}.self_attn.o_proj.bias"),
        Row(f"{layer}.ln_2.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}"),
        Row(f"{layer}.mlp.c_fc.weight", f"{ours}.mlp.up_proj.weight", ("transpose",)),
        Row(f"{layer}.mlp.c_fc.bias", f"{ours}.mlp.up_proj.bias"),
        Row(f"{layer}.mlp.c_proj.weight", f"{ours}.mlp.down_proj.weight", ("transpose",)),
        Row(f"{layer}.mlp.c_proj.bias", f"{ours}.mlp.down_proj.bias"),
        Row("ln_f.{p}", "norm.{p}"),
    ]


FAMILY = Family(
    model_type="gpt2",
    shape="variform_decoder",
    same=SAME,
    fixed=FIXED,
    read=read,
    write=write,
    inert=frozenset(
        [
            "reorder_and_upcast_attn",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ]
    ),
    in_training=frozenset({"embd_pdrop"}),
    rows=rows,
    prefix="transformer.",
    heads={
        "AutoModel": Head("GPT2Model"),
        "AutoModelForCausalLM": Head("GPT2LMHeadModel", [Row("lm_head.weight", "lm_head.weight")]),
        "AutoModelForSequenceClassification": Head(
            "GPT2ForSequenceClassification",
            [Row("score.weight", "classifier.out_proj.weight")],
            fixed={"classifier_bias": False},
        ),
        "AutoModelForTokenClassification": Head(
            "GPT2ForTokenClassification", [Row("classifier.{p}", "classifier.out_proj.{p}")]
        ),
        "AutoModelForQuestionAnswering": Head("GPT2ForQuestionAnswering", [Row("qa_outputs.{p}", "qa_outputs.{p}")]),
    },
    ignored=(r"(.*\.)?attn\.(bias|masked_bias)",),
)
