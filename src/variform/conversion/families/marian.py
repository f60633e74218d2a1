"""Marian (arXiv:1804.00344): the original Transformer, as trained for translation by OPUS-MT."""

from dataclasses import replace
from typing import Any

from ..family import Head
from . import bart, pegasus


def read(foreign) -> dict[str, Any]:
    is_shared = foreign.tie_word_embeddings and foreign.share_encoder_decoder_embeddings
    return bart.read(foreign) | {"tie_encoder_decoder_embeddings": is_shared}


def write(form) -> dict[str, Any]:
    is_shared = form.tie_encoder_decoder_embeddings or not form.tie_word_embeddings
    return bart.write(form) | {"share_encoder_decoder_embeddings": is_shared}


FAMILY = replace(
    bart.FAMILY,
    model_type="marian",
    same=bart.SAME | {"decoder.vocab_size": "decoder_vocab_size"},
    fixed=bart.FIXED | pegasus.SINUSOIDAL | bart.POST_NORM,
    read=read,
    write=write,
    inert=bart.FAMILY.inert | {"share_encoder_decoder_embeddings"},
    heads={"AutoModel": Head("MarianModel"), "AutoModelForSeq2SeqLM": Head("MarianMTModel", bart.LANGUAGE_MODEL)},
    computed=pegasus.FAMILY.computed,
)
