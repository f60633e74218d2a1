"""The Trainers of the scripts: transformers' own, made safe, with a time budget and batches of like length as options."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .budget import TimeBudget
from .data.buckets import LengthBucketSampler
from .lora import save_adapter
from .safety import SafeTraining


class Budgeted(SafeTraining):
    """`SafeTraining` whose learning rate may follow a clock, and whose batches may be of like length.

    Args:
        budget: the time to train for; with None the schedule and the steps are those of the training arguments.
        bucket_by: columns whose lengths decide which examples share a batch (`("input_ids", "labels")`); None shuffles.
        base_name: of adapters, the folder or repo of the model that they adapt; see `save_adapter`.
        safety: see `Safety`.
    """

    def __init__(
        self,
        *args: Any,
        budget: TimeBudget | None = None,
        bucket_by: Sequence[str] | None = None,
        base_name: str | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.budget, self.bucket_by, self.base_name = budget, bucket_by, base_name
        # The budget comes first: the other callbacks read from it
        super().__init__(*args, callbacks=[*([budget] if budget else []), *(callbacks or [])], **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer  # made by Trainer before it asks for the schedule
        self.lr_scheduler = LambdaLR(optimizer, self.budget.learning_rate_factor)  # type: ignore[arg-type]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's; adapters are saved with what they belong to."""
        super()._save(output_dir, state_dict)
        if hasattr(self.model, "peft_config"):
            model: Any = self.model
            save_adapter(model, str(output_dir or self.args.output_dir), base_name=self.base_name)

    def reached(self, state: dict[str, Any]) -> str | None:
        if self.budget is None:
            return super().reached(state)
        used = state["stateful_callbacks"].get(type(self.budget).__name__, {}).get("attributes", {}).get("used", 0.0)
        return f"{used / 60:.1f} of {self.budget.seconds / 60:g} min" if used >= self.budget.seconds else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.bucket_by is None:
            return super()._get_train_sampler(train_dataset)
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [tuple(len(example[name]) for name in self.bucket_by) for example in examples]
        # What one optimizer step sees, on all processes: they wait for each other, so their batches are of like length
        batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBucketSampler(lengths, batch_size, seed=self.args.seed)


class SafeTrainer(Budgeted, Trainer):
    """A Trainer that loses nothing: see `SafeTraining` and `Budgeted`."""


class SafeSeq2SeqTrainer(Budgeted, Seq2SeqTrainer):
    """A Seq2SeqTrainer that loses nothing: see `SafeTraining` and `Budgeted`."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's: what fills up the last batch of several processes is not measured; Seq2SeqTrainer would."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
