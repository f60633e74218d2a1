"""BigBird (arXiv:2007.14062) as its native class computes it in evaluation: all random blocks fall on the first.

In training the native class draws blocks, anew for each head, and ours goes on with the pattern that it was given. Nor does
it then drop out attention where it is sparse, and it drops out embeddings before their norm, not after it.

The native class counts blocks over the padded batch: a text of fewer blocks than the longest has another last block there
than alone, and may be cut into blocks where alone it is seen whole. Ours sees each text as the native class sees it alone.
"""

from dataclasses import replace
from typing import Any

from ..family import Head
from ..tables import Row
from . import bert


def read(foreign) -> dict[str, Any]:
    is_sparse = foreign.attention_type == "block_sparse"
    # A block longer than any text shows it whole
    is_cut = is_sparse and foreign.block_size <= foreign.max_position_embeddings
    blocks = f"big_bird:{foreign.block_size},random={foreign.num_random_blocks},placement=first"
    return bert.read(foreign) | {
        "attention_patterns": [blocks if is_cut else "full"],
        "attention_bias": True if foreign.use_bias else ["o"],
        "embedding_scale": "sqrt" if foreign.rescale_embeddings else 1.0,
        "pooler_act": foreign.hidden_act,  # of the one in the head that labels sequences
    }


def write(form) -> dict[str, Any]:
    pattern = form.pattern_of(0)
    is_sparse = pattern.name == "big_bird"
    # Without random blocks the native class runs on short texts alone
    blocks = {"block_size": pattern.block, "num_random_blocks": max(1, pattern.random)} if is_sparse else {}
    return {
        **bert.write(form),
        **blocks,
        "attention_type": "block_sparse" if is_sparse else "original_full",
        "use_bias": "q" in form.biased_projections,
        "rescale_embeddings": form.embedding_scale != 1.0,
    }


def rows(form) -> list[Row]:
    return [row for row in bert.rows(form) if not row.foreign.startswith("pooler")]


TANH = {"pooler_act": "tanh"}
# All but two of its classes have a pooler that they do not read
UNREAD = ("bert.pooler.weight", "bert.pooler.bias")
CLASSIFIER = [
    Row("classifier.dense.{p}", "model.pooler.dense.{p}"),
    Row("classifier.out_proj.{p}", "classifier.out_proj.{p}"),
]
BERT = bert.FAMILY.heads

FAMILY = replace(
    bert.FAMILY,
    model_type="big_bird",
    read=read,
    write=write,
    # `sep_token_id` is for answers to questions; sizes of blocks are not read where attention is full
    inert=frozenset({"sep_token_id", "attention_type", "block_size", "num_random_blocks"}),
    rows=rows,
    heads={
        "AutoModel": Head("BigBirdModel", [Row("pooler.{p}", "pooler.dense.{p}")], fixed=TANH),
        "AutoModelForMaskedLM": replace(BERT["AutoModelForMaskedLM"], foreign="BigBirdForMaskedLM", unread=UNREAD),
        "AutoModelForSequenceClassification": Head("BigBirdForSequenceClassification", CLASSIFIER, unread=UNREAD),
        "AutoModelForTokenClassification": Head("BigBirdForTokenClassification", bert.CLASSIFIER, unread=UNREAD),
        # Answers to questions have a feed-forward layer of their own, which no head of ours has
        "AutoModelForMultipleChoice": Head(
            "BigBirdForMultipleChoice",
            [Row("bert.pooler.{p}", "model.pooler.dense.{p}"), *bert.CLASSIFIER],
            fixed=TANH,
        ),
    },
)
