"""A model to be used, whichever of the things that hold a model it is loaded from, and data to judge it by."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..conversion.convert import family_of, find_folder
from ..conversion.trust import check_remote_code
from ..model.configuration_variform import AUTO_MAP
from .data.arguments import DataArguments
from .data.loading import PLACE, BadRows, load_files
from .data.splits import load_data
from .lora import CONFIG_FILE
from .merging import load_adapted
from .models import check_vocabulary, load_model, load_tokenizer, split_gguf
from .options import ModelArguments

# The shapes that write, and the head they do it with
WRITING = {"variform_decoder": AutoModelForCausalLM, "variform_encoder_decoder": AutoModelForSeq2SeqLM}


def load_for_use(options: ModelArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model that writes, and its tokenizer: float32, in evaluation mode, on the accelerator if there is one.

    Args:
        options: `model` is a checkpoint of Variform, one that converts, also `folder/file.gguf`, or the folder of an adapter,
            whose base is loaded from where its config says.

    Raises:
        ValueError: where no model is named, or it is an encoder; and as `load_model`, `load_adapted` and `load_tokenizer`.
    """
    if options.model is None:
        raise ValueError("Give `model`: the folder of a checkpoint or of an adapter, a `.gguf` file, or a repo.")
    if options.form or options.set:
        raise ValueError("`form` and `set` make new models; here a trained one is used.")
    disable_progress_bar()  # of files and tensors
    model: Any
    source = options.model
    if (Path(source) / CONFIG_FILE).is_file():
        adapted = load_adapted(Path(source))
        model, source = adapted.model, adapted.source
    else:
        model = load_model(options, writing_class(options), False, {})
    named = options.tokenizer or any(Path(options.model).glob("tokenizer*.json"))
    tokenizer = load_tokenizer(options if named else dataclasses.replace(options, model=source))
    check_vocabulary(model.config, tokenizer)
    return model.eval().to(torch.accelerator.current_accelerator() or torch.device("cpu")), tokenizer


def writing_class(options: ModelArguments) -> Any:
    """The Auto class under which a checkpoint writes.

    Raises:
        ValueError: for an encoder, or a family that does not convert.
    """
    check_remote_code(str(options.model), options.revision, options.trust_remote_code)
    path, gguf = split_gguf(str(options.model))
    config = AutoConfig.from_pretrained(path if gguf else find_folder(path, revision=options.revision), **gguf)
    shape = config.model_type if config.model_type in AUTO_MAP else family_of(config).shape
    if shape not in WRITING:
        raise ValueError(f"`model={options.model}` is a {shape}: it reads, and does not write.")
    return WRITING[shape]


@dataclass
class JudgedData(DataArguments):
    """Data to judge by: as for training, or `eval_files` alone, or none."""

    def __post_init__(self):
        if self.dataset or self.train_files:
            super().__post_init__()


def load_judged(arguments: JudgedData, needs: Sequence[str]) -> DatasetDict:
    """As `load_data`; of `eval_files` alone, all rows are in "validation", and "train" is empty.

    Raises:
        ValueError: as `load_data`.
    """
    if arguments.dataset or arguments.train_files:
        return load_data(arguments, needs)
    budget = BadRows(arguments.skip_bad_rows)
    patterns = {"validation": list(arguments.eval_files or [])}
    rows = load_files(arguments, needs, patterns, budget)["validation"].remove_columns(PLACE)
    budget.check()
    judged = rows.select(range(min(len(rows), arguments.max_eval_examples or len(rows))))
    return DatasetDict({"train": rows.select([]), "validation": judged})
