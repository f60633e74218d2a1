"""The log of a run as a file: a JSON line for each logging step and evaluation, one history however often it was stopped."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from ..report.curves import LOG_FILE, read_log


class RunLog(TrainerCallback):
    """Writes `log.jsonl` in the output folder, and adds the speed, `tokens_per_second`, to Trainer's logs.

    A run that goes on from a checkpoint drops the lines after it first: they come again; and the line in which Trainer sums
    up a run that was stopped. Give it to Trainer before the callbacks that report what is logged.

    The tokens are those of all processes, padding left out, as `TrainingArguments.include_num_input_tokens_seen` counts
    them; without that the speed is left out.
    """

    def __init__(self):
        self.file: Path | None = None
        self._since = (0.0, 0.0)  # seconds, tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self._since = (time.monotonic(), float(state.num_input_tokens_seen))
        if state.is_world_process_zero:
            self.file = Path(args.output_dir) / LOG_FILE
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = [line for line in read_log(self.file) if "train_loss" not in line]
            kept = [line for line in lines if line["step"] <= state.global_step > 0]
            self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs:
            return
        now, tokens = time.monotonic(), float(state.num_input_tokens_seen)
        seconds, seen = now - self._since[0], tokens - self._since[1]
        if "loss" in logs and seen > 0:
            logs["tokens_per_second"] = round(seen / max(seconds, 1e-9), 1)
            self._since = (now, tokens)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
