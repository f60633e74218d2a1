"""Loading where nothing may be missing: a checkpoint is whole and finite, or refused with the file's name."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .conversion.checkpoint import Checkpoint

SHOWN = 6  # names of tensors in a message


def load_strictly(
    auto_class: Any, folder: str | Path, *, new_head: bool = False, allow_missing: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A model of ours whose every tensor came from the folder. `from_pretrained` alone warns, and starts at random instead.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        folder: as `save_pretrained` writes it.
        new_head: the folder may lack the head and its pooler, or have others; the body is whole all the same.
        allow_missing: start at random what the folder lacks, and leave out what the form does not have.
        kwargs: of `from_pretrained`.

    Raises:
        FileNotFoundError: if the config or a file of weights is not there.
        ValueError: naming the file that is damaged, leads out of the folder, or does not fit the config, and the tensors that
            are missing, left over, of another kind of number, or not finite.
    """
    folder = Path(folder)
    read_config(folder / CONFIG_NAME)
    weights = Checkpoint(folder)
    files = ", ".join(str(path) for path in weights.files)
    not_floats = sorted(name for name, spec in weights.specs.items() if not spec.is_floating_point())
    refuse_tensors(not_floats, files, "holds no floating-point numbers in")
    try:
        model, report = auto_class.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=new_head, **kwargs
        )
    except RuntimeError as error:  # shapes that do not fit, of which transformers logs a table
        raise ValueError(f"{files} does not fit {folder / CONFIG_NAME}: {str(error).splitlines()[0]}") from error
    body = f"{model.base_model_prefix}." if new_head else ""
    found = {kind: [name if isinstance(name, str) else name[0] for name in names] for kind, names in report.items()}
    complaints = {"mismatched_keys": "has another size in"}
    if not allow_missing:
        complaints |= {"missing_keys": "lacks", "unexpected_keys": "has beyond the form"}
    for kind, what in complaints.items():
        names = [name for name in found[kind] if name.startswith(body) and not (new_head and ".pooler." in name)]
        refuse_tensors(sorted(names), files, what)
    refuse_tensors(find_nonfinite(model), files, "holds NaN or infinity in")
    return model


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        FileNotFoundError: if it is not there. ValueError: if it is not a JSON object, or nested too deep to be one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a folder that `save_pretrained` has written.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a config ({type(error).__name__}: {error}); save it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object of fields, got a {type(values).__name__}.")
    return values


def find_nonfinite(model: PreTrainedModel) -> list[str]:
    """The names of the parameters and buffers of a model that hold NaN or infinity, sorted."""
    tensors = model.state_dict()
    return sorted(name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all())


def refuse_tensors(names: list[str], files: str, what: str) -> None:
    """Raises ValueError if there are names."""
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ValueError(f"{files} {what} {', '.join(names[:SHOWN])}{more}; download or save it again.")
