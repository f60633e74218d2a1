"""How transformers' own classes map onto the family: for each, its config and its weight names.

A weight is a row `(native name, our name, operations)`. Names hold placeholders (`PLACES`). Operations, applied from
left to right, are `same`, `transpose` (GPT-2 keeps `(in, out)`), `squeeze` (a leading 1) and `split` (one fused native
tensor into the equal parts that a tuple names). `None` on our side: another row brings the tensor, or it is computed.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from variform import VariformDecoderConfig, VariformEncoderConfig, VariformEncoderDecoderConfig

PLACES = {"i": r"\d+", "p": "weight|bias", "side": "encoder|decoder", "qkv": "[qkv]", "mlp": "gate|up|down"}
OPERATIONS: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]] = {
    "same": lambda tensor, parts: (tensor,),
    "transpose": lambda tensor, parts: (tensor.T,),
    "squeeze": lambda tensor, parts: (tensor.squeeze(0),),
    "split": lambda tensor, parts: tensor.chunk(parts),
}
Row = tuple[str, str | tuple[str, ...] | None, str]


class Bridge(NamedTuple):
    """One native class: the class's name in transformers, its config as one of ours, and its weights' names."""

    native: str
    config: Callable[[PreTrainedConfig], PreTrainedConfig]
    table: list[Row]


def convert(tensors: dict[str, torch.Tensor], table: list[Row]) -> dict[str, torch.Tensor]:
    """Native tensors (weights or gradients) by name -> ours.

    Raises:
        KeyError: for a native name that no row of the table matches.
    """
    rows = [(re.compile(_pattern(native)), ours, operations) for native, ours, operations in table]
    converted = {}
    for name, tensor in tensors.items():
        for pattern, ours, operations in rows:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            targets = (ours,) if isinstance(ours, str) else ours or ()
            parts = (tensor,)
            for operation in operations.split():
                parts = OPERATIONS[operation](*parts, len(targets))
            converted.update({target.format(**match.groupdict()): part for target, part in zip(targets, parts)})
            break
        else:
            raise KeyError(f"No row of the table matches {name!r}.")
    return converted


def _pattern(template: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", lambda place: f"(?P<{place[1]}>{PLACES[place[1]]})", re.escape(template))


def special_ids(config: PreTrainedConfig) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}


def patterns(config: PreTrainedConfig) -> list[str]:
    """A pattern a layer, from the native config's `layer_types`."""
    names = {"full_attention": "full", "sliding_attention": f"sliding_window:{config.sliding_window}"}
    return [names[layer_type] for layer_type in config.layer_types]


def bert(config: PreTrainedConfig, **differences) -> VariformEncoderConfig:
    """BERT; `differences` are what its relatives do otherwise."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "position_embedding_type": "learned",
        "embedding_norm": True,
        "norm_type": "layer_norm",
        "norm_placement": "post",
        "norm_eps": config.layer_norm_eps,
        "attention_bias": True,
        "hidden_act": config.hidden_act,
        "gated_mlp": False,
        "mlp_bias": True,
        "lm_head_transform": True,
        "lm_head_bias": True,
        "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        **special_ids(config),
    }
    return VariformEncoderConfig(**(fields | differences))


def roberta(config: PreTrainedConfig) -> VariformEncoderConfig:
    # The rows up to the padding id hold no position
    offset = config.pad_token_id + 1
    return bert(config, position_offset=offset, max_position_embeddings=config.max_position_embeddings - offset)


def albert(config: PreTrainedConfig) -> VariformEncoderConfig:
    return bert(config, embedding_size=config.embedding_size, num_hidden_groups=config.num_hidden_groups)


def modernbert(config: PreTrainedConfig) -> VariformEncoderConfig:
    return VariformEncoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        attention_patterns=patterns(config),
        rope_parameters=config.rope_parameters,
        embedding_norm=True,
        norm_type="layer_norm",
        norm_eps=config.norm_eps,
        norm_bias=config.norm_bias,
        skip_first_norm=True,
        attention_bias=config.attention_bias,
        hidden_act=config.hidden_activation,
        mlp_bias=config.mlp_bias,
        lm_head_transform=True,
        lm_head_bias=config.decoder_bias,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.mlp_dropout,
        **special_ids(config),
    )


def gpt2(config: PreTrainedConfig) -> VariformDecoderConfig:
    return VariformDecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.n_positions,
        position_embedding_type="learned",
        norm_type="layer_norm",
        norm_eps=config.layer_norm_epsilon,
        attention_bias=True,
        hidden_act=config.activation_function,
        gated_mlp=False,
        mlp_bias=True,
        hidden_dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        tie_word_embeddings=config.tie_word_embeddings,
        **special_ids(config),
    )


def llama(config: PreTrainedConfig, **differences) -> VariformDecoderConfig:
    """Llama; `differences` are what its relatives do otherwise."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
        "norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_ids(config),
    }
    return VariformDecoderConfig(**(fields | differences))


def gemma2(config: PreTrainedConfig, **differences) -> VariformDecoderConfig:
    """Gemma 2; `differences` are what Gemma 3 does otherwise."""
    fields = {
        "attention_patterns": patterns(config),
        "embedding_scale": "sqrt",
        "norm_placement": "sandwich",
        "norm_unit_offset": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_act": config.hidden_activation,
    }
    return llama(config, **(fields | differences))


def gemma3(config: PreTrainedConfig) -> VariformDecoderConfig:
    # The native class has the field for a soft-cap on the scores and does not use it
    return gemma2(config, qk_norm="head", attn_logit_softcapping=None)


def t5(config: PreTrainedConfig) -> VariformEncoderDecoderConfig:
    # `tie_word_embeddings` is always True here; whether the head is shared stands in `scale_decoder_outputs`
    is_tied = config.scale_decoder_outputs
    stack = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "head_dim": config.d_kv,
        "position_embedding_type": "relative_bias",
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "norm_eps": config.layer_norm_epsilon,
        "attention_scale": 1.0,
        "hidden_act": config.dense_act_fn,
        "gated_mlp": config.is_gated_act,
    }
    stack |= {f"{name}_dropout": config.dropout_rate for name in ("hidden", "attention", "activation")}
    return VariformEncoderDecoderConfig(
        encoder={**stack, "num_hidden_layers": config.num_layers},
        decoder={
            **stack,
            "num_hidden_layers": config.num_decoder_layers,
            "logit_scale": config.d_model**-0.5 if is_tied else 1.0,
        },
        tie_word_embeddings=is_tied,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", config.pad_token_id),
        **special_ids(config),
    )


def bart(config: PreTrainedConfig, **differences) -> VariformEncoderDecoderConfig:
    """BART; `differences`, in both stacks, are what its relatives do otherwise."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "learned",
        "position_offset": 2,
        "embedding_norm": True,
        "embedding_scale": "sqrt" if config.scale_embedding else 1.0,
        "norm_type": "layer_norm",
        "norm_placement": "post",
        "norm_eps": 1e-5,
        "attention_bias": True,
        "hidden_act": config.activation_function,
        "gated_mlp": False,
        "mlp_bias": True,
        "lm_head_bias": True,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
    } | differences
    stacks = {}
    for side in ("encoder", "decoder"):
        stacks[side] = shared | {
            "intermediate_size": getattr(config, f"{side}_ffn_dim"),
            "num_hidden_layers": getattr(config, f"{side}_layers"),
            "num_attention_heads": getattr(config, f"{side}_attention_heads"),
            "layerdrop": getattr(config, f"{side}_layerdrop"),
        }
    stacks["encoder"]["lm_head_bias"] = False
    stacks["decoder"]["vocab_size"] = getattr(config, "decoder_vocab_size", config.vocab_size)
    return VariformEncoderDecoderConfig(
        **stacks,
        tie_word_embeddings=config.tie_word_embeddings,
        tie_encoder_decoder_embeddings=getattr(config, "share_encoder_decoder_embeddings", True),
        decoder_start_token_id=config.decoder_start_token_id,
        **special_ids(config),
    )


# Sines first, then cosines, from position 0
SINUSOIDAL = {"position_embedding_type": "sinusoidal", "position_offset": 0, "embedding_norm": False}


def pegasus(config: PreTrainedConfig) -> VariformEncoderDecoderConfig:
    return bart(config, **SINUSOIDAL, norm_placement="pre")


def marian(config: PreTrainedConfig) -> VariformEncoderDecoderConfig:
    return bart(config, **SINUSOIDAL)


def bert_embeddings_table(base: str) -> list[Row]:
    return [
        (f"{base}.embeddings.word_embeddings.weight", "model.embed_tokens.weight", "same"),
        (f"{base}.embeddings.position_embeddings.weight", "model.embeddings.positions.weight", "same"),
        (f"{base}.embeddings.token_type_embeddings.weight", "model.embeddings.token_types.weight", "same"),
        (f"{base}.embeddings.LayerNorm.{{p}}", "model.embeddings.norm.{p}", "same"),
    ]


def bert_table(base: str) -> list[Row]:
    layer, ours = f"{base}.encoder.layer.{{i}}", "model.layers.{i}"
    return [
        *bert_embeddings_table(base),
        (f"{layer}.attention.self.query.{{p}}", f"{ours}.self_attn.q_proj.{{p}}", "same"),
        (f"{layer}.attention.self.key.{{p}}", f"{ours}.self_attn.k_proj.{{p}}", "same"),
        (f"{layer}.attention.self.value.{{p}}", f"{ours}.self_attn.v_proj.{{p}}", "same"),
        (f"{layer}.attention.output.dense.{{p}}", f"{ours}.self_attn.o_proj.{{p}}", "same"),
        (f"{layer}.attention.output.LayerNorm.{{p}}", f"{ours}.attention_residual.output_norm.{{p}}", "same"),
        (f"{layer}.intermediate.dense.{{p}}", f"{ours}.mlp.up_proj.{{p}}", "same"),
        (f"{layer}.output.dense.{{p}}", f"{ours}.mlp.down_proj.{{p}}", "same"),
        (f"{layer}.output.LayerNorm.{{p}}", f"{ours}.mlp_residual.output_norm.{{p}}", "same"),
    ]


def masked_lm_table(head: str, dense: str, norm: str) -> list[Row]:
    """The head of BERT and its relatives, whose output bias has two names."""
    return [
        (f"{head}.{dense}.{{p}}", "head_transform.dense.{p}", "same"),
        (f"{head}.{norm}.{{p}}", "head_transform.norm.{p}", "same"),
        (f"{head}.decoder.weight", "lm_head.weight", "same"),
        (f"{head}.decoder.bias", None, "same"),
        (f"{head}.bias", "lm_head.bias", "same"),
    ]


def albert_table() -> list[Row]:
    group, ours = "albert.encoder.albert_layer_groups.{i}.albert_layers.0", "model.layers.{i}"
    return [
        *bert_embeddings_table("albert"),
        ("albert.encoder.embedding_hidden_mapping_in.{p}", "model.embeddings.projection.{p}", "same"),
        (f"{group}.attention.query.{{p}}", f"{ours}.self_attn.q_proj.{{p}}", "same"),
        (f"{group}.attention.key.{{p}}", f"{ours}.self_attn.k_proj.{{p}}", "same"),
        (f"{group}.attention.value.{{p}}", f"{ours}.self_attn.v_proj.{{p}}", "same"),
        (f"{group}.attention.dense.{{p}}", f"{ours}.self_attn.o_proj.{{p}}", "same"),
        (f"{group}.attention.LayerNorm.{{p}}", f"{ours}.attention_residual.output_norm.{{p}}", "same"),
        (f"{group}.ffn.{{p}}", f"{ours}.mlp.up_proj.{{p}}", "same"),
        (f"{group}.ffn_output.{{p}}", f"{ours}.mlp.down_proj.{{p}}", "same"),
        (f"{group}.full_layer_layer_norm.{{p}}", f"{ours}.mlp_residual.output_norm.{{p}}", "same"),
        *masked_lm_table("predictions", "dense", "LayerNorm"),
    ]


def modernbert_table() -> list[Row]:
    layer, ours = "model.layers.{i}", "model.layers.{i}"
    queries_keys_values = tuple(f"{ours}.self_attn.{name}_proj.{{p}}" for name in "qkv")
    return [
        ("model.embeddings.tok_embeddings.weight", "model.embed_tokens.weight", "same"),
        ("model.embeddings.norm.{p}", "model.embeddings.norm.{p}", "same"),
        (f"{layer}.attn.Wqkv.{{p}}", queries_keys_values, "split"),
        (f"{layer}.attn.Wo.{{p}}", f"{ours}.self_attn.o_proj.{{p}}", "same"),
        (f"{layer}.attn_norm.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}", "same"),
        (f"{layer}.mlp.Wi.{{p}}", (f"{ours}.mlp.gate_proj.{{p}}", f"{ours}.mlp.up_proj.{{p}}"), "split"),
        (f"{layer}.mlp.Wo.{{p}}", f"{ours}.mlp.down_proj.{{p}}", "same"),
        (f"{layer}.mlp_norm.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}", "same"),
        ("model.final_norm.{p}", "model.norm.{p}", "same"),
        ("head.dense.{p}", "head_transform.dense.{p}", "same"),
        ("head.norm.{p}", "head_transform.norm.{p}", "same"),
        ("decoder.{p}", "lm_head.{p}", "same"),
    ]


def gpt2_table() -> list[Row]:
    layer, ours = "transformer.h.{i}", "model.layers.{i}"
    queries_keys_values = [tuple(f"{ours}.self_attn.{name}_proj.{p}" for name in "qkv") for p in ("weight", "bias")]
    return [
        ("transformer.wte.weight", "model.embed_tokens.weight", "same"),
        ("transformer.wpe.weight", "model.embeddings.positions.weight", "same"),
        (f"{layer}.ln_1.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}", "same"),
        (f"{layer}.attn.c_attn.weight", queries_keys_values[0], "transpose split"),
        (f"{layer}.attn.c_attn.bias", queries_keys_values[1], "split"),
        (f"{layer}.attn.c_proj.weight", f"{ours}.self_attn.o_proj.weight", "transpose"),
        (f"{layer}.attn.c_proj.bias", f"{ours}.self_attn.o_proj.bias", "same"),
        (f"{layer}.ln_2.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}", "same"),
        (f"{layer}.mlp.c_fc.weight", f"{ours}.mlp.up_proj.weight", "transpose"),
        (f"{layer}.mlp.c_fc.bias", f"{ours}.mlp.up_proj.bias", "same"),
        (f"{layer}.mlp.c_proj.weight", f"{ours}.mlp.down_proj.weight", "transpose"),
        (f"{layer}.mlp.c_proj.bias", f"{ours}.mlp.down_proj.bias", "same"),
        ("transformer.ln_f.{p}", "model.norm.{p}", "same"),
        ("lm_head.weight", "lm_head.weight", "same"),
    ]


def llama_table(mlp_norm: str = "post_attention_layernorm") -> list[Row]:
    layer = "model.layers.{i}"
    return [
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "same"),
        (f"{layer}.input_layernorm.weight", f"{layer}.attention_residual.input_norm.weight", "same"),
        (f"{layer}.self_attn.{{qkv}}_proj.{{p}}", f"{layer}.self_attn.{{qkv}}_proj.{{p}}", "same"),
        (f"{layer}.self_attn.o_proj.{{p}}", f"{layer}.self_attn.o_proj.{{p}}", "same"),
        (f"{layer}.self_attn.{{qkv}}_norm.weight", f"{layer}.self_attn.{{qkv}}_norm.weight", "same"),
        (f"{layer}.{mlp_norm}.weight", f"{layer}.mlp_residual.input_norm.weight", "same"),
        (f"{layer}.mlp.{{mlp}}_proj.{{p}}", f"{layer}.mlp.{{mlp}}_proj.{{p}}", "same"),
        ("model.norm.weight", "model.norm.weight", "same"),
        ("lm_head.weight", "lm_head.weight", "same"),
    ]


def gemma_table() -> list[Row]:
    layer = "model.layers.{i}"
    return [
        *llama_table(mlp_norm="pre_feedforward_layernorm"),
        (f"{layer}.post_attention_layernorm.weight", f"{layer}.attention_residual.branch_norm.weight", "same"),
        (f"{layer}.post_feedforward_layernorm.weight", f"{layer}.mlp_residual.branch_norm.weight", "same"),
    ]


def t5_table() -> list[Row]:
    layer, ours = "{side}.block.{i}.layer", "model.{side}.layers.{i}"
    bias = "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [
        ("shared.weight", None, "same"),
        ("{side}.embed_tokens.weight", "model.{side}.embed_tokens.weight", "same"),
        (bias, "model.{side}.position_bias.weight", "same"),
        ("{side}.final_layer_norm.weight", "model.{side}.norm.weight", "same"),
        ("lm_head.weight", "lm_head.weight", "same"),
        (f"{layer}.0.SelfAttention.{{qkv}}.weight", f"{ours}.self_attn.{{qkv}}_proj.weight", "same"),
        (f"{layer}.0.SelfAttention.o.weight", f"{ours}.self_attn.o_proj.weight", "same"),
        (f"{layer}.0.layer_norm.weight", f"{ours}.attention_residual.input_norm.weight", "same"),
        (f"{layer}.1.EncDecAttention.{{qkv}}.weight", f"{ours}.cross_attn.{{qkv}}_proj.weight", "same"),
        (f"{layer}.1.EncDecAttention.o.weight", f"{ours}.cross_attn.o_proj.weight", "same"),
        (
            "decoder.block.{i}.layer.1.layer_norm.weight",
            "model.decoder.layers.{i}.cross_residual.input_norm.weight",
            "same",
        ),
    ]
    for side, mlp in (("encoder", 1), ("decoder", 2)):
        native, ours = f"{side}.block.{{i}}.layer.{mlp}", f"model.{side}.layers.{{i}}"
        rows += [
            (f"{native}.layer_norm.weight", f"{ours}.mlp_residual.input_norm.weight", "same"),
            (f"{native}.DenseReluDense.wi.weight", f"{ours}.mlp.up_proj.weight", "same"),
            (f"{native}.DenseReluDense.wi_0.weight", f"{ours}.mlp.gate_proj.weight", "same"),
            (f"{native}.DenseReluDense.wi_1.weight", f"{ours}.mlp.up_proj.weight", "same"),
            (f"{native}.DenseReluDense.wo.weight", f"{ours}.mlp.down_proj.weight", "same"),
        ]
    return rows


def bart_table(norm: str, positions: str | None = None) -> list[Row]:
    """BART and its relatives. `norm`: where a residual's norm stands. `positions`: our table, unless computed."""
    layer = "model.{side}.layers.{i}"
    return [
        ("model.shared.weight", None, "same"),
        ("model.{side}.embed_tokens.weight", "model.{side}.embed_tokens.weight", "same"),
        ("model.{side}.embed_positions.weight", positions, "same"),
        ("model.{side}.layernorm_embedding.{p}", "model.{side}.embeddings.norm.{p}", "same"),
        (f"{layer}.self_attn.{{qkv}}_proj.{{p}}", f"{layer}.self_attn.{{qkv}}_proj.{{p}}", "same"),
        (f"{layer}.self_attn.out_proj.{{p}}", f"{layer}.self_attn.o_proj.{{p}}", "same"),
        (f"{layer}.self_attn_layer_norm.{{p}}", f"{layer}.attention_residual.{norm}.{{p}}", "same"),
        (f"{layer}.encoder_attn.{{qkv}}_proj.{{p}}", f"{layer}.cross_attn.{{qkv}}_proj.{{p}}", "same"),
        (f"{layer}.encoder_attn.out_proj.{{p}}", f"{layer}.cross_attn.o_proj.{{p}}", "same"),
        (f"{layer}.encoder_attn_layer_norm.{{p}}", f"{layer}.cross_residual.{norm}.{{p}}", "same"),
        (f"{layer}.fc1.{{p}}", f"{layer}.mlp.up_proj.{{p}}", "same"),
        (f"{layer}.fc2.{{p}}", f"{layer}.mlp.down_proj.{{p}}", "same"),
        (f"{layer}.final_layer_norm.{{p}}", f"{layer}.mlp_residual.{norm}.{{p}}", "same"),
        ("model.{side}.layer_norm.{p}", "model.{side}.norm.{p}", "same"),
        ("lm_head.weight", "lm_head.weight", "same"),
        ("final_logits_bias", "lm_head.bias", "squeeze"),
    ]


BERT_TABLE = bert_table("bert") + masked_lm_table("cls.predictions", "transform.dense", "transform.LayerNorm")
ROBERTA_TABLE = bert_table("roberta") + masked_lm_table("lm_head", "dense", "layer_norm")
LEARNED = "model.{side}.embeddings.positions.weight"

BRIDGES = {
    "bert": Bridge("BertForMaskedLM", bert, BERT_TABLE),
    "roberta": Bridge("RobertaForMaskedLM", roberta, ROBERTA_TABLE),
    "albert": Bridge("AlbertForMaskedLM", albert, albert_table()),
    "modernbert": Bridge("ModernBertForMaskedLM", modernbert, modernbert_table()),
    "gpt2": Bridge("GPT2LMHeadModel", gpt2, gpt2_table()),
    "llama": Bridge("LlamaForCausalLM", lambda config: llama(config, mlp_bias=config.mlp_bias), llama_table()),
    "qwen3": Bridge(
        "Qwen3ForCausalLM",
        lambda config: llama(config, qk_norm="head", attention_patterns=patterns(config)),
        llama_table(),
    ),
    "gemma2": Bridge("Gemma2ForCausalLM", gemma2, gemma_table()),
    "gemma3": Bridge("Gemma3ForCausalLM", gemma3, gemma_table()),
    "t5": Bridge("T5ForConditionalGeneration", t5, t5_table()),
    "bart": Bridge("BartForConditionalGeneration", bart, bart_table("output_norm", LEARNED)),
    "pegasus": Bridge("PegasusForConditionalGeneration", pegasus, bart_table("input_norm")),
    "marian": Bridge("MarianMTModel", marian, bart_table("output_norm")),
}
