"""What must not change when a run goes on: numbers of the batch, the data, the model; and what a run is refused for."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, TrainingArguments

EXAMPLES_READ = 64  # spread over the data, for its fingerprint and for the share of labels that count
NOTED_ONLY = ("torch", "transformers", "max_steps", "num_train_epochs")  # a difference is told, and no reason to stop
# Numbers that a checkpoint's optimizer brings back, whatever a run that goes on was given
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
IGNORED_LABEL = -100
# Said by from_pretrained, not by the form
NOT_OF_THE_FORM = ("transformers_version", "_name_or_path", "architectures", "auto_map")


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint remembers of its run, for `changed_facts` to compare when a run goes on."""
    args = trainer.args
    return {
        "world_size": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "data_length": data_length(trainer.train_dataset),
        "data_fingerprint": data_fingerprint(trainer.train_dataset),
        "max_steps": args.max_steps,
        "num_train_epochs": args.num_train_epochs,
        "warmup_steps": args.warmup_steps,
        "max_grad_norm": args.max_grad_norm,
        **{name: getattr(args, name) for name in OF_THE_OPTIMIZER},
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "model_config": _form(trainer.model),
        "adapter": _adapter(trainer.model),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def data_length(dataset: Any) -> int | None:
    """Examples in a dataset; None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def data_fingerprint(dataset: Any) -> str | None:
    """A hash of examples spread over the data, for two runs to see that theirs differ; None for a stream."""
    if dataset is None or data_length(dataset) is None:
        return None
    digest = hashlib.sha256()
    with same_randomness():
        for index in spread(len(dataset)):
            _add(digest, dataset[index])
    return digest.hexdigest()[:16]


def spread(length: int, count: int = EXAMPLES_READ) -> list[int]:
    """Up to `count` indices below `length`, evenly spaced, with the first and the last."""
    if length <= count:
        return list(range(length))
    return [round(number * (length - 1) / (count - 1)) for number in range(count)]


@contextmanager
def same_randomness() -> Iterator[None]:
    """The same random numbers inside each time, and outside as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def refuse_arguments(args: TrainingArguments) -> None:
    """What Trainer does otherwise than it was told, without a word.

    Raises:
        ValueError: for fewer processes than a launcher started or was asked for, for `fsdp` that would be plain data
            parallelism, and for half precision that would be single.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    refuse_world_size(asked, args.world_size)
    if args.device.type != "cpu":
        return
    if getattr(args, "fsdp", None):
        raise ValueError(
            "`fsdp` needs an accelerator: on a CPU, Trainer trains with whole copies of the model and does not say so. "
            "Leave it out, or shard at loading: `from_pretrained(distributed_config=...)`."
        )
    if args.fp16 or args.fp16_full_eval:
        raise ValueError("`fp16` needs an accelerator: on a CPU, Trainer ignores it. Leave it out, or take `bf16`.")


def refuse_world_size(asked: int, got: int) -> None:
    """Raises ValueError where one number of processes was asked for and another one trains."""
    if asked != got:
        raise ValueError(
            f"{asked} processes were asked for, but {got} would train together: on a CPU give `--use_cpu true`, and start "
            f"them by `torchrun --nproc_per_node {asked}` (`accelerate launch --cpu` starts one)."
        )


def refuse_masked_labels(trainer: Trainer) -> float | None:
    """Looks at examples spread over the data, as the model will get them; at all of them if none of those counts.

    Returns:
        The share of labels that count in what it looked at; None for a stream, and for data without `labels`.

    Raises:
        ValueError: if there is nothing to learn from: every label is -100.
    """
    dataset: Any = trainer.train_dataset
    length = data_length(dataset)
    if not length:
        return None
    share = _trained_share(trainer, spread(length))
    if share == 0 and length > EXAMPLES_READ:
        share = _trained_share(trainer, range(length))
    if share == 0:
        raise ValueError(
            f"0.0 % of the labels in `train_dataset` ({length:,} examples) count: all are {IGNORED_LABEL}, and there is "
            "nothing to learn. Were the answers cut off by the longest length, or is the wrong part masked?"
        )
    return share


def _trained_share(trainer: Trainer, indices: Sequence[int]) -> float | None:
    collate = trainer.data_collator
    dataset: Any = trainer.train_dataset
    if trainer.args.remove_unused_columns:
        collate = trainer._get_collator_with_removed_columns(collate)
    counted = total = 0
    with same_randomness():
        for start in range(0, len(indices), trainer.args.per_device_train_batch_size):
            batch = collate(
                [dataset[index] for index in indices[start : start + trainer.args.per_device_train_batch_size]]
            )
            labels = batch.get("labels") if hasattr(batch, "get") else None
            if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
                return None
            counted += int((labels != IGNORED_LABEL).sum())
            total += labels.numel()
    return counted / total if total else None


def _form(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    form = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in form.items() if name not in NOT_OF_THE_FORM}


def _adapter(model: Any) -> dict[str, Any] | None:
    """What an adapter is, of a model that has one."""
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    numbers = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    names = ("target_modules", "target_parameters", "modules_to_save")
    facts = {name: getattr(config, name, None) for name in numbers}
    facts |= {name: _in_order(getattr(config, name, None)) for name in names}
    return {"type": str(config.peft_type.value), **facts}


def _in_order(names: Any) -> Any:
    return names if names is None or isinstance(names, str) else sorted(names)


def _add(digest: Any, value: Any) -> None:
    """Feeds a value to a hash: arrays by their bytes, mappings and sequences by what they hold, the rest as text."""
    if isinstance(value, dict) or hasattr(value, "keys"):
        for name in sorted(value.keys()):
            digest.update(f"{name}=".encode())
            _add(digest, value[name])
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.ascontiguousarray(
            torch.as_tensor(value).cpu().numpy() if isinstance(value, torch.Tensor) else value
        )
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())
