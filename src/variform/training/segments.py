"""Training on long texts in segments, with the memory of each carried into the next (Transformer-XL, arXiv:1901.02860)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.cache_utils import Cache, DynamicCache

from ..model.outputs import CACHE
from .safety import SafeTraining


class Segments(Dataset):
    """A stream of tokens in consecutive segments: `{"input_ids", "labels"}`, whose labels are the next tokens.

    They are shifted already, unlike those that heads of causal models take: the last label of a segment is the first token
    of the one after. `SegmentTrainer` knows. What is left of the stream behind the last whole segment is left out.

    Args:
        stream: `(tokens,)` integers. length: of a segment, in tokens.

    Raises:
        ValueError: for a segment without a token, or a stream without a token to predict.
    """

    def __init__(self, stream: torch.Tensor, length: int):
        if length < 1:
            raise ValueError(f"`length={length}` must be at least 1 token.")
        if len(stream) < 2:
            raise ValueError(f"The stream has {len(stream)} tokens; give two or more, one of them to predict.")
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return max(1, (len(self.stream) - 1) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.length
        tokens = self.stream[start : start + self.length + 1].long()
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class SegmentSampler(Sampler[int]):
    """Indices of segments in an order in which each row of a batch goes on where it stopped in the batch before.

    The segments are dealt out in `lanes` runs, as equal as can be; a batch has the next segment of each. Where the runs are
    not equal, the last batch has the first rows alone.
    """

    def __init__(self, num_segments: int, lanes: int):
        self.num_segments, self.lanes = num_segments, min(lanes, num_segments)

    def __len__(self) -> int:
        return self.num_segments

    def __iter__(self) -> Iterator[int]:
        whole, longer = divmod(self.num_segments, self.lanes)
        starts = [lane * whole + min(lane, longer) for lane in range(self.lanes)]
        for step in range(whole):
            yield from (start + step for start in starts)
        yield from (start + whole for start in starts[:longer])


class ForgetBetweenEpochs(TrainerCallback):
    """The text begins anew."""

    def __init__(self, trainer: "SegmentTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.memory = None


class SegmentTrainer(SafeTraining, Trainer):
    """A Trainer for decoders with `memory_length`: each row of a batch reads on in its text, remembering what it read.

    Trainer itself hands nothing from one step to the next. This one passes each output's `past_key_values` into the next
    call, in training and in evaluation apart, saves the memory with every checkpoint and takes it up again, so that a run
    that is resumed is the run that was not stopped. Arguments as for `SafeTraining`; the datasets are `Segments`.

    Raises:
        ValueError: for a model without memory, or data of another kind.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not getattr(self.model.config, "memory_length", 0):
            raise ValueError("`memory_length=0`: the model remembers nothing; build it with the length of its memory.")
        for name in ("train_dataset", "eval_dataset"):
            data = getattr(self, name)
            if data is not None and not isinstance(data, Segments):
                raise ValueError(
                    f"`{name}` is a {type(data).__name__}; it must be `Segments`, which follow each other."
                )
        self._loss_shifts_labels = False  # else Trainer would not count each row's first label
        self.memory: Cache | None = None
        self.add_callback(ForgetBetweenEpochs(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        segments: Any = self.train_dataset if train_dataset is None else train_dataset
        return SegmentSampler(len(segments), self.args.train_batch_size * self.args.world_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SegmentSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's, with the memory of the last call; the labels are shifted already."""
        inputs = dict(inputs)
        rows = len(inputs["input_ids"])
        if self.memory is not None and len(self.memory.layers[0].keys) > rows:
            self.memory.batch_select_indices(torch.arange(rows))  # the last batch has the first rows alone
        memory = self._new_memory() if self.memory is None else self.memory
        inputs |= {"shift_labels": inputs.pop("labels"), "past_key_values": memory, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.memory = getattr(outputs, CACHE)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, from an empty memory; the one of the training stays as it is."""
        training, self.memory = self.memory, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.memory = training

    def _new_memory(self) -> Cache:
        model: Any = self.model
        return DynamicCache(config=model.config)

    def _memory_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"memory_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process saves its own state here, so its memory too; the next epoch begins without one."""
        super()._save_rng_state(output_dir)
        if self.memory is not None and self.state.epoch != int(self.state.epoch):
            kept = {str(number): layer.keys.contiguous() for number, layer in enumerate(self.memory.layers)}
            save_file(kept, self._memory_file(output_dir), metadata={"seen": str(self.memory.get_seq_length())})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._memory_file(checkpoint).is_file():
            return
        self.memory = self._new_memory()
        with safe_open(self._memory_file(checkpoint), "pt", device=str(self.args.device)) as file:
            for number, layer in enumerate(self.memory.layers):
                kept = file.get_tensor(str(number))
                layer.update(kept, kept[..., :0])  # in a memory, values have no width
                layer.cumulative_length = int(file.metadata()["seen"])
