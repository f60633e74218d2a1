"""Longformer (arXiv:2004.05150): RoBERTa that sees a window, and some tokens that see, and are seen by, all.

Which tokens those are is told by `global_attention_mask`, on both sides. Where none is given, three native classes choose:

- the one that labels sequences takes the first token. Under that head the patterns have `tokens=1`, which does the same; it
  holds beside a mask too, where the native class goes by the mask alone.
- those that answer questions and choose look for separators in the ids: the question, or what follows the first text. No
  pattern reads ids, so ours marks nothing there, and the caller gives the mask.
"""

import math
from dataclasses import replace
from typing import Any

from ..family import without_repeats
from ..tables import Row
from . import bert, roberta


def window_patterns(foreign, max_position_embeddings: int, tokens: int = 0) -> list[str]:
    """The patterns of `attention_window`, one for all layers or one each, which counts both sides of a window together."""
    native = foreign.attention_window
    both_sides = native if isinstance(native, list) else [native] * foreign.num_hidden_layers
    # A native window may reach beyond the longest text
    sizes = [min(size // 2, max_position_embeddings) for size in both_sides]
    by_rule = f",tokens={tokens}" if tokens else ""
    return without_repeats([f"local_global:{size}{by_rule},global_projections=true" for size in sizes])


def attention_window(stack) -> list[int]:
    """The `attention_window` of a stack; of what its class cannot run, another one, which is refused when it is compared.

    The class fills texts up to a multiple of the widest window, which must be a multiple of all, and fails on windows of 2.
    """
    longest = stack.max_position_embeddings
    windows = [getattr(stack.pattern_of(layer), "window", 1) for layer in range(stack.num_hidden_layers)]
    unit = math.lcm(*(2 * window for window in windows if window < longest))
    sizes = [2 * window if window < longest else -(-2 * longest // unit) * unit for window in windows]
    runs = 2 not in sizes and all(max(sizes) % size == 0 for size in sizes)
    return sizes if runs else [max(4, *sizes)] * len(sizes)


def read(foreign) -> dict[str, Any]:
    offset = roberta.first_row(foreign)
    length = foreign.max_position_embeddings - offset
    return {
        "position_offset": offset,
        "max_position_embeddings": length,
        "attention_patterns": window_patterns(foreign, length),
        "classifier_dropout": foreign.hidden_dropout_prob,
    }


def read_labels(foreign) -> dict[str, Any]:
    return {"attention_patterns": window_patterns(foreign, read(foreign)["max_position_embeddings"], tokens=1)}


def write(form) -> dict[str, Any]:
    rows = form.max_position_embeddings + roberta.first_row(form)
    return {"max_position_embeddings": rows, "attention_window": attention_window(form)}


PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def global_rows(foreign: str, ours: str) -> list[Row]:
    """The projections of global tokens."""
    names = PROJECTIONS.items()
    return [Row(f"{foreign}.{theirs}_global.{{p}}", f"{ours}.{name}_global.{{p}}") for theirs, name in names]


def rows(form) -> list[Row]:
    return [*bert.rows(form), *global_rows("encoder.layer.{i}.attention.self", "layers.{i}.self_attn")]


ASKS = "marks tokens as global by the separators in a text; here, say which they are with `global_attention_mask`."
HEADS = {
    name: replace(head, foreign=head.foreign.replace("Roberta", "Longformer"))
    for name, head in roberta.FAMILY.heads.items()
}

FAMILY = replace(
    roberta.FAMILY,
    model_type="longformer",
    read=read,
    write=write,
    # `sep_token_id` marks tokens where no mask does; of the windows, the patterns say as much as a text can show
    inert=frozenset({"sep_token_id", "onnx_export", "attention_window"}),
    rows=rows,
    prefix="longformer.",
    heads=HEADS
    | {
        "AutoModelForSequenceClassification": replace(HEADS["AutoModelForSequenceClassification"], read=read_labels),
        "AutoModelForQuestionAnswering": replace(HEADS["AutoModelForQuestionAnswering"], differs=ASKS),
        "AutoModelForMultipleChoice": replace(HEADS["AutoModelForMultipleChoice"], differs=ASKS),
    },
)
