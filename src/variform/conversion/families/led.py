"""LED (arXiv:2004.05150, sec. 7): BART whose encoder sees as Longformer does, by `global_attention_mask`."""

from dataclasses import replace
from typing import Any

from ..family import Head
from ..tables import Row
from . import bart, longformer

LONGEST = {f"{side}.max_position_embeddings": f"max_{side}_position_embeddings" for side in bart.STACKS}


def read(foreign) -> dict[str, Any]:
    return {
        "tie_encoder_decoder_embeddings": foreign.tie_word_embeddings,
        "encoder.attention_patterns": longformer.window_patterns(foreign, foreign.max_encoder_position_embeddings),
    }


def write(form) -> dict[str, Any]:
    return {"attention_window": longformer.attention_window(form.encoder)}


def rows(form) -> list[Row]:
    local, ours = "encoder.layers.{i}.self_attn.longformer_self_attn", "encoder.layers.{i}.self_attn"
    return [
        *(Row(f"{local}.{theirs}.{{p}}", f"{ours}.{name}.{{p}}") for theirs, name in longformer.PROJECTIONS.items()),
        *longformer.global_rows(local, ours),
        Row("encoder.layers.{i}.self_attn.output.{p}", f"{ours}.o_proj.{{p}}"),
        # What the encoder shares with the decoder, and the decoder's own
        *bart.rows(form),
    ]


FAMILY = replace(
    bart.FAMILY,
    model_type="led",
    same=bart.SAME | LONGEST,
    fixed=bart.FAMILY.fixed | bart.in_both(position_offset=0),
    read=read,
    write=write,
    inert=frozenset({"classifier_dropout", "attention_window"}),
    rows=rows,
    prefix="led.",
    heads={
        "AutoModel": Head("LEDModel"),
        "AutoModelForSeq2SeqLM": Head("LEDForConditionalGeneration", bart.LANGUAGE_MODEL),
    },
)
