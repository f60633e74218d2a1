"""An adapter and its base become one ordinary checkpoint, which is checked to compute the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..conversion.check import COMPARED, load, make_inputs
from ..conversion.checkpoint import refuse_existing, whole_folder
from ..conversion.convert import VOCABULARIES, auto_class_of_ours, find_folder, quiet
from .lora import LABELS, TASKS, load_adapter_strictly, read_config, read_record
from .models import load_model, split_gguf
from .options import ModelArguments

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)

# The largest difference of an output that merging may make, as a share of the largest output
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Adapted(NamedTuple):
    """An adapter on its base, that model itself, where it is from, and the dtype in which it is stored there."""

    model: "PeftModel"
    base: PreTrainedModel
    source: str
    dtype: torch.dtype


def merge_adapter(
    folder: str | Path, out: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | None = None
) -> float:
    """Write the model that an adapter and its base make together, with the tokenizer, and check that it computes the same.

    Args:
        folder: the adapter. out: a folder that does not exist yet; it is not made where anything is refused.
        base: a checkpoint, ours or one that converts; default: the one that the adapter names.
        dtype: of the merged weights; default: that of the base's. The sum itself is made in float32.

    Returns:
        The largest difference of an output between the adapted model and the merged one, read back from `out`, both in
        float32, as a share of the largest output.

    Raises:
        ValueError: as `load_adapter_strictly`; if no base is known; if the outputs differ by more than rounding.
        FileExistsError: if `out` holds anything. FileNotFoundError: if there is no adapter.
    """
    folder, out = Path(folder), Path(out)
    refuse_existing(out)
    adapted, model, source, stored_dtype = load_adapted(folder, base=base)
    dtype = dtype or stored_dtype
    with whole_folder(out) as temporary:
        save_tokenizer([folder, Path(source)], temporary)
        inputs, _ = make_inputs(temporary, model)
        expected = outputs_of(adapted, inputs)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
        merged.to(dtype).save_pretrained(temporary)
        found = outputs_of(load(temporary), inputs)
        difference = max(
            ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items()
        )
        if not difference <= TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]):  # NaN is refused as well
            raise ValueError(
                f"The merged model differs from {folder} by {difference:.1e} of the largest output in {dtype}: merge with "
                "`dtype=torch.float32`."
            )
    return difference


def load_adapted(folder: Path, *, base: str | Path | None = None) -> Adapted:
    """An adapter on the model it was trained on, in float32 and in evaluation mode.

    Args:
        base: that model, where the adapter does not say, or it has moved since.

    Raises:
        ValueError, FileNotFoundError: as `merge_adapter`.
    """
    config = read_config(folder)
    source = str(base or config.base_model_name_or_path or "")
    if not source:
        raise ValueError(
            f"{folder} does not say what it was trained on: give `base`, the folder or repo of that model."
        )
    model, dtype = load_base(source, config, read_record(folder))
    return Adapted(load_adapter_strictly(model, folder).eval(), model, source, dtype)


def load_base(
    source: str, config: "PeftConfig", record: Mapping[str, Any] | None
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model that an adapter belongs to, in float32, with the dtype in which it is stored."""
    fields = {}
    if record is None:
        endings = {task: ending for ending, task in TASKS.items()}
        name = f"AutoModel{endings[config.task_type]}" if config.task_type else "AutoModelForMaskedLM"
        name = {"AutoModelForConditionalGeneration": "AutoModelForSeq2SeqLM", "AutoModelModel": "AutoModel"}.get(
            name, name
        )
    else:
        saved = transformers.AutoConfig.for_model(**record["config"])
        name = auto_class_of_ours(record["architecture"], saved)
        if isinstance(record["config"].get("id2label"), dict) and "Classification" in name:
            fields = {label: getattr(saved, label) for label in LABELS}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # about a head that the adapter brings: what it lacks is refused when it is loaded
    try:
        with quiet():
            model = load_model(ModelArguments(model=source), getattr(transformers, name), False, fields)
    finally:
        logging.set_verbosity(verbosity)
    path, gguf = split_gguf(source)
    dtype = None if gguf else getattr(transformers.AutoConfig.from_pretrained(find_folder(path)), "dtype", None)
    return model.eval(), dtype or torch.float32


def save_tokenizer(sources: list[Path], target: Path) -> None:
    """Saves the tokenizer of the first of the folders that has one."""
    for source in sources:
        if any(path for pattern in VOCABULARIES for path in source.glob(pattern)):
            AutoTokenizer.from_pretrained(source).save_pretrained(target)
            return
    logger.warning(f"No tokenizer lies in {' or '.join(map(str, sources))}: the merged model is saved without one.")


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a model that can be compared, by name."""
    output = model(**inputs)
    return {name: output[name] for name in COMPARED if getattr(output, name, None) is not None}
