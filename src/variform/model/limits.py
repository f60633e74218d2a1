"""What no config file may make a machine do: run code from elsewhere, or compute until it stops."""

import os
from collections.abc import Mapping
from typing import Any

from .checks import refuse

# No form that somebody has trained comes near; a file that somebody made to stop this machine does
MOST_LAYERS = 4096
MOST_PARAMETERS = 10**13
MOST_ENTRIES = 50_000
MOST_LABELS = 10**7  # each of which has an entry in
UNCOUNTED = ("id2label", "label2id")


def refuse_excess(condition: bool, message: str) -> None:
    """Refuses a size beyond any form that is known, unless the environment has `VARIFORM_LIMITS=off`."""
    refuse(
        condition and os.environ.get("VARIFORM_LIMITS") != "off", f"{message}; set VARIFORM_LIMITS=off if it is meant."
    )


def check_stored(stored: Mapping[str, Any], where: str = "") -> None:
    """What no config file may hold: the name of a repo whose kernels would run, or more entries than any form has.

    Args:
        stored: the file as a dict. where: the dict's name inside the file, with a point.
    """
    for key, value in stored.items():
        if "_implementation" in key and "/" in str(value):
            raise ValueError(
                f"`{where}{key}={value!r}` would run the code of a repo that a config names; remove it, and say which backend "
                "to take where the model is loaded."
            )
        if key == "num_labels" and isinstance(value, int):
            refuse_excess(value > MOST_LABELS, f"`{where}num_labels={value}` is more than {MOST_LABELS:,}")
        if where == "" and key in ("encoder", "decoder") and isinstance(value, Mapping):
            check_stored(value, f"{key}.")
        elif key not in UNCOUNTED:
            refuse_excess(
                count_entries(value) > MOST_ENTRIES, f"`{where}{key}` holds more than {MOST_ENTRIES:,} entries"
            )


def count_entries(value: Any) -> int:
    """The entries of nested dicts and lists; counting ends beyond `MOST_ENTRIES`."""
    found, left = 0, [value]
    while left and found <= MOST_ENTRIES:
        part = left.pop()
        if isinstance(part, (Mapping, list)):
            found += len(part)
            left += (part.values() if isinstance(part, Mapping) else part) if found <= MOST_ENTRIES else []
    return found


def check_lengths(config: Any) -> None:
    """Layers and patterns, before anything is made for each of them."""
    refuse_excess(
        config.num_hidden_layers > MOST_LAYERS,
        f"`num_hidden_layers={config.num_hidden_layers}` is more than {MOST_LAYERS}",
    )
    refuse_excess(
        len(config.attention_patterns) > MOST_LAYERS,
        f"`attention_patterns` has {len(config.attention_patterns)} entries, more than {MOST_LAYERS}",
    )


def check_parameters(config: Any) -> None:
    """The number of parameters, roughly, once all sizes are derived."""
    width, tables = config.hidden_size, config.vocab_size + config.type_vocab_size
    if config.position_embedding_type == "learned":
        tables += config.max_position_embeddings
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    inner = max(
        config.intermediate_size, (config.num_experts + config.num_shared_experts) * config.moe_intermediate_size
    )
    a_layer = width * (heads * config.head_dim + 3 * inner)
    count = tables * config.embedding_size + (config.num_hidden_groups or config.num_hidden_layers) * a_layer
    sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts",
    ]
    given = ", ".join(f"`{name}={getattr(config, name)}`" for name in sizes)
    refuse_excess(count > MOST_PARAMETERS, f"{given} make more than {MOST_PARAMETERS:.0e} parameters")
