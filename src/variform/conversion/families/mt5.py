"""mT5 (arXiv:2010.11934): T5 1.1 in many languages."""

from dataclasses import replace

from ..family import Head
from . import t5

FAMILY = replace(
    t5.FAMILY,
    model_type="mt5",
    read=t5.read_unscaled,
    write=t5.write_unscaled,
    heads={
        "AutoModel": Head("MT5Model"),
        "AutoModelForSeq2SeqLM": replace(
            t5.FAMILY.heads["AutoModelForSeq2SeqLM"], foreign="MT5ForConditionalGeneration"
        ),
    },
)
