"""A student that begins as some layers of its teacher."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")  # the number of a layer in the name of its tensor


def student_of(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's class and width with some of its layers and all that is around them (arXiv:1910.01108, sec. 3).

    Args:
        teacher: an encoder or a decoder of the family, whole or on the meta device; it stays as it is.
        layers: their numbers, from 0, in the order they are to have.

    Raises:
        ValueError: for a layer that the teacher does not have, or none.
    """
    config, count = teacher.config, teacher.config.num_hidden_layers
    if not layers or not set(layers) <= set(range(count)):
        raise ValueError(f"`student_layers={list(layers)}` must be among the teacher's layers, 0 to {count - 1}.")
    values = {**config.to_dict(), "num_hidden_layers": len(layers), "origin": None}
    for name in ("attention_patterns", "mlp_layer_types"):  # these are tiled over the layers
        if tiled := values.get(name):
            values[name] = [tiled[layer % len(tiled)] for layer in layers]
    with torch.device(teacher.device):
        student = type(teacher)(type(config)(**values))
    theirs = teacher.state_dict()
    names = {name: LAYER.sub(lambda at: str(layers[int(at[0])]), name) for name in student.state_dict()}
    student.load_state_dict({name: theirs[source] for name, source in names.items()})
    return student.train()
