"""Training that cannot be lost: any Trainer with checkpoints that are whole, exact resuming, and a stop before damage.

    class MyTrainer(SafeTraining, Trainer): ...
    finished = MyTrainer(model=..., args=..., train_dataset=...).train_safely()

Three weaknesses of Trainer are mended, each by overriding one method: a process killed in the middle of a save leaves a
folder that cannot be resumed from (`_save_checkpoint`); what has changed between two runs is not noticed (`train_safely`);
one NaN destroys the weights and the run ends as if nothing had happened (`_get_grad_norm`).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed
from transformers import TrainerState, TrainingArguments

from .budget import agree
from .checkpoints import (
    MANIFEST,
    STAGED_MODEL,
    TRAINER_STATE,
    Found,
    Verify,
    changed_facts,
    check,
    check_writable,
    commit,
    install_model,
    is_no_space,
    is_trained,
    newest_committed,
    prune,
    read_trainer_state,
    set_aside,
    size_of,
    staged_model,
)
from .divergence import DivergenceWatch
from .facts import NOTED_ONLY, OF_THE_OPTIMIZER, refuse_arguments, refuse_masked_labels, run_facts
from .interruption import SaveAtEpochEnd, SaveOnInterrupt

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:  # it stands before any of them
    Base = object

BATCH_VALUES_WRITTEN = 100_000  # of one tensor, in the report of a batch that gave no finite number
OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")


class NonFiniteLossError(ArithmeticError):
    """A loss or a gradient was NaN or infinite; the weights are those of the step before."""


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before are as they were."""


@dataclass(frozen=True)
class Safety:
    """How careful a run is.

    Args:
        max_skipped_steps: so many steps in a row with a loss or gradient that is not finite are left out; one more stops.
        on_save_error: "stop", or "continue" without this checkpoint.
        stop_on_divergence: stop where the loss is 3 times its running median for 5 logs, instead of a warning.
        verify: "hash" (files below 2 GiB), "full", or "size".

    Raises:
        ValueError: a number below 0, an unknown word.
    """

    max_skipped_steps: int = 0
    on_save_error: Literal["stop", "continue"] = "stop"
    stop_on_divergence: bool = False
    verify: Verify = "hash"

    def __post_init__(self):
        if self.max_skipped_steps < 0:
            raise ValueError(f"`max_skipped_steps` must be at least 0, got {self.max_skipped_steps}.")
        for name, allowed in (("on_save_error", ("stop", "continue")), ("verify", ("hash", "size", "full"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")


class SafeTraining(Base):
    """Put before a Trainer class: `class SafeTrainer(SafeTraining, Trainer)`.

    Args:
        safety: how careful the run is; everything else is the Trainer's.

    Raises:
        ValueError: for arguments that Trainer would not heed (`refuse_arguments`), an `output_dir` that cannot be written.
    """

    def __init__(self, *args: Any, safety: Safety | None = None, **kwargs: Any):
        self.safety = safety or Safety()
        for training in (*args, *kwargs.values()):
            if isinstance(training, TrainingArguments):  # before Trainer acts on them
                refuse_arguments(training)
                check_writable(str(training.output_dir))
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False  # it writes 0.0 where the loss is NaN
        listeners = [item for item in self.callback_handler.callbacks if isinstance(item, SaveOnInterrupt)]
        self.interruption = listeners[0] if listeners else SaveOnInterrupt()
        if not listeners:
            self.add_callback(self.interruption)
        self.add_callback(DivergenceWatch(self.safety.stop_on_divergence, self.say))
        self.add_callback(SaveAtEpochEnd())  # after all that ask for a save
        self.skipped_steps = 0  # left out in this run
        self._skipped_in_a_row = 0
        self._facts: dict[str, Any] | None = None
        self._committed_step: int | None = None
        self._renews_optimizer = False
        self._has_whole_loss = False  # what Trainer sums up is of all steps, not of those since the run went on
        self._micro_batches: list[tuple[Any, torch.Tensor]] = []  # of this step: what went in, and the loss

    def say(self, message: str) -> None:
        """Tells a person, on the main process."""
        if self.is_world_process_zero():
            print(message, flush=True)

    # ---- the course of a run ----

    def train_safely(self, resume: str | Path = "auto", *, allow_changes: Sequence[str] = ()) -> bool:
        """Trains to the end, from where an earlier run stopped, and commits the final model in `output_dir`.

        Args:
            resume: "auto" goes on from the newest committed checkpoint, or starts; "none" starts; a path names the
                checkpoint. Checkpoints of later steps than the start are renamed: they belong to another course.
            allow_changes: facts that may differ from the checkpoint's, such as `per_device_train_batch_size`;
                `model_config` stands for all of its fields.

        Returns:
            Whether training came to its end; False when a signal stopped it, and all that is needed to go on is saved.

        Raises:
            ValueError: for data without a label that counts, a named checkpoint that is not whole, a fact that changed.
            NonFiniteLossError, DivergedError, CheckpointError: as their names say.
        """
        folder = Path(str(self.args.output_dir))
        with self.interruption.listening():
            self._finish_installing(folder)
            if is_trained(folder) and resume == "auto":
                self._restore_finished(folder)
                self.say(
                    f"{folder} holds a trained model: nothing to do. `--resume none` trains another in its place."
                )
                return True
            share = refuse_masked_labels(self)
            if share is not None and share < 0.01:
                self.say(f"Note: only {100 * share:.2g} % of the labels count.")
            self._facts = run_facts(self)
            checkpoint = self._choose_checkpoint(folder, resume, allow_changes)
            if checkpoint and (reason := self.reached(read_trainer_state(checkpoint))):
                self._restore_finished(checkpoint)
                self.say(f"{checkpoint.name}: already at {reason}, nothing to do.")
            else:
                self.say(f"Going on from {checkpoint}." if checkpoint else "Training. Ctrl-C stops and saves.")
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.interruption.interrupted:
                self.say(
                    f"Stopped at step {self.state.global_step}; the newest checkpoint is {self._newest()}. "
                    "Run the same command again to go on."
                )
                return False
            self.save_model()
        return True

    def reached(self, state: dict[str, Any]) -> str | None:
        """How far a run came, if that is as far as this one is to go: "14 of 10 steps"; else None."""
        args = self.args
        if args.max_steps > 0:
            done = state["global_step"] >= args.max_steps
            return f"{state['global_step']} of {args.max_steps} steps" if done else None
        done = (state.get("epoch") or 0) >= args.num_train_epochs
        return f"{state['epoch']:g} of {args.num_train_epochs:g} epochs" if done else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; what to keep is decided after a checkpoint is committed, not before."""
        if self._facts is None:
            self._facts = run_facts(self)
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._micro_batches, self._skipped_in_a_row, self._committed_step = [], 0, None
        self._has_whole_loss = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self._keep

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; without a folder, the final model takes the place of what is in `output_dir` at once, or not at all."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        folder = Path(str(self.args.output_dir))
        is_main = self.is_world_process_zero()
        try:
            with staged_model(folder) if is_main else nullcontext(folder / STAGED_MODEL) as staging:
                self._wait()
                super().save_model(str(staging), _internal_call=True)
                self._wait()
                if is_main:
                    self.state.save_to_json(str(staging / TRAINER_STATE))
                    commit(staging, {"step": self.state.global_step}, verify=self.safety.verify)
                    install_model(folder)
        except Exception as error:
            if not is_no_space(error):
                raise
            raise CheckpointError(f"{self._no_space(folder)}. The newest checkpoint is {self._newest()}.") from error
        self._wait()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ---- going on ----

    def _choose_checkpoint(self, folder: Path, resume: str | Path, allow_changes: Sequence[str]) -> Path | None:
        """The checkpoint to go on from. The main process looks, all others are told."""
        found = self._from_main(lambda: self._find(folder, resume))
        for path, reason in found.passed_over:
            self.say(f"Passed over {path.name}: {reason}.")
        checkpoint: Path | None = found.checkpoint
        step = -1
        if checkpoint:
            self._refuse_changes(checkpoint, allow_changes)
            step = read_trainer_state(checkpoint)["global_step"]
        if resume != "auto":
            renamed = self._from_main(lambda: set_aside(folder, step) + self._leave_old_model(folder))
            for path in renamed:
                self.say(f"Set aside an earlier run's {path.name}.")
        return checkpoint

    def _find(self, folder: Path, resume: str | Path) -> Found:
        if resume == "none":
            return Found(None, [])
        if resume == "auto":
            return newest_committed(folder, verify=self.safety.verify)
        if inside := sorted(path.name for path in Path(resume).glob("checkpoint-*")):
            raise ValueError(
                f"`resume={str(resume)!r}` is the folder of a run: name one of {', '.join(inside)} in it."
            )
        try:
            check(resume, verify=self.safety.verify)
        except ValueError as reason:
            raise ValueError(f"`resume={str(resume)!r}` is not a checkpoint to go on from: {reason}.") from None
        return Found(Path(resume), [])

    def _leave_old_model(self, folder: Path) -> list[Path]:
        """A model trained before still loads, but no longer counts as what this run came to."""
        if is_trained(folder):
            (folder / MANIFEST).unlink()
        return []

    def _refuse_changes(self, checkpoint: Path, allow_changes: Sequence[str]) -> None:
        manifest = check(checkpoint, verify="size")
        refused = {}
        for field, (old, new) in changed_facts(manifest["facts"], self._facts or {}).items():
            change = f"{field}: checkpoint {old}, now {new}"
            if field in NOTED_ONLY:
                self.say(f"Note: {change}.")
            elif field in allow_changes or field.split(".")[0] in allow_changes:
                self.say(f"Allowed: {change}.")
                self._renews_optimizer |= field in OF_THE_OPTIMIZER
            else:
                refused[change] = field.split(".")[0]
        if refused:
            raise ValueError(
                f"{'; '.join(refused)}: going on from {checkpoint} would be another run. Set it back, or pass "
                f"`--allow_resume_changes {' '.join(dict.fromkeys(refused.values()))}`."
            )
        processes = min(self.args.world_size, manifest["facts"].get("world_size", 1))
        names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else []
        names = names or ([] if self.args.world_size > 1 else ["rng_state.pth"])
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for name in (*names, *(() if sharded else OPTIMIZER_FILES), TRAINER_STATE):
            if name not in manifest["files"]:
                raise ValueError(
                    f"{checkpoint} has no {name}: with `save_only_model` a checkpoint holds a model, not a run. "
                    "Start from it as a model, or pass `--resume none`."
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; numbers that were allowed to change are those that the run was given."""
        if checkpoint is None or not self._renews_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        given = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, new in zip(self.optimizer.param_groups, given):
            group["lr"] *= new["initial_lr"] / group["initial_lr"]
            group.update({name: value for name, value in new.items() if name != "lr"})
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in given]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; a name that nothing is measured by is a mistake of the user's."""
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    def _restore_finished(self, folder: Path) -> None:
        """The weights and the state of a run that is over."""
        model: Any = self.model
        if hasattr(model, "peft_config"):  # Trainer would take checkpoints beside it for more adapters
            model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        else:
            self._load_from_checkpoint(str(folder))
        if (folder / TRAINER_STATE).is_file():
            self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE))

    def _finish_installing(self, folder: Path) -> None:
        if self._from_main(lambda: install_model(folder)):
            self.say(f"Finished what was cut off: the final model is in {folder}.")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that are another's under a second name are not missing; those that are stop the run."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint is not of this model: {len(missing)} weights are missing {missing[:3]}, "
                f"{len(load_result.unexpected_keys)} unknown {load_result.unexpected_keys[:3]}."
            )
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()

    # ---- saving ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As Trainer's, and then: the manifest, what is too old, the Hub."""
        step = self.state.global_step
        if self._committed_step == step:
            return  # the epoch ends where the step did
        run_dir = Path(self._get_output_dir(trial=trial))
        checkpoint = run_dir / f"checkpoint-{step}"
        if self.is_world_process_zero():
            shutil.rmtree(checkpoint, ignore_errors=True)  # the rest of a save that was cut off
        self._wait()
        error: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
            self._save_log_state(checkpoint)
        except Exception as caught:  # torch, safetensors and the system each have a type of their own
            error = caught
        if not agree(float(error is not None), self.args.device) and self.is_world_process_zero():
            try:
                commit(checkpoint, self._facts or {}, verify=self.safety.verify)
            except OSError as caught:
                error = caught
        if agree(float(error is not None), self.args.device):
            self._give_up(checkpoint, error)
            return
        self._committed_step = step
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            prune(run_dir, self._keep, protected=[best] if best else [])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        self._wait()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer asks for this before the checkpoint is committed."""
        if self._committed_step == self.state.global_step:
            super()._push_from_checkpoint(checkpoint_folder)

    def _give_up(self, checkpoint: Path, error: Exception | None) -> None:
        message = f"Could not write {checkpoint}: {error or 'another process failed'}"
        if error is not None and is_no_space(error):
            message = self._no_space(checkpoint)
        if self.is_world_process_zero():
            shutil.rmtree(checkpoint, ignore_errors=True)
        self._wait()
        if self.safety.on_save_error == "stop":
            last = self._newest()
            raise CheckpointError(f"{message}. The newest checkpoint is {last}.") from error
        self.say(f"Warning: {message}. Going on without it (`on_save_error=continue`).")

    def _newest(self) -> Path | None:
        return newest_committed(str(self.args.output_dir), verify="size").checkpoint

    def _no_space(self, folder: Path) -> str:
        """With what it takes: as the last checkpoint did, else the weights and what the optimizer keeps of them."""
        if last := self._newest():
            size = size_of(last)
        else:
            kept = self.optimizer.state.values() if self.optimizer else ()
            values = [*self.model.state_dict().values(), *(value for state in kept for value in state.values())]
            size = sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))
        return f"No space writing {folder} (needs about {size / 2**20:,.1f} MB)"

    def _save_log_state(self, checkpoint: Path) -> None:
        """What this process has summed up for the next lines of the log; Trainer forgets it."""
        state: dict[str, Any] = {"loss": self._tr_loss.item(), "since_step": self._globalstep_last_logged}
        state["loss_before"] = self._total_loss_scalar
        state["callbacks"] = {name: callback.log_state() for name, callback in self._log_callbacks()}
        checkpoint.mkdir(parents=True, exist_ok=True)
        self._log_state_file(checkpoint).write_text(json.dumps(state), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once, before the first step of a run that goes on: the sums for the next lines of the log come back too."""
        super()._load_rng_state(checkpoint)
        if checkpoint and (file := self._log_state_file(Path(checkpoint))).is_file():
            state = json.loads(file.read_text(encoding="utf-8"))
            self._tr_loss.fill_(state["loss"])
            self._globalstep_last_logged = state["since_step"]
            self._total_loss_scalar, self._has_whole_loss = state["loss_before"], True
            for name, callback in self._log_callbacks():
                if name in state["callbacks"]:
                    callback.load_log_state(state["callbacks"][name])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which would divide the loss of the whole training by the steps since it went on."""
        if "train_loss" in logs and self._has_whole_loss:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _log_callbacks(self) -> list[tuple[str, Any]]:
        """Those that sum up something from one line of the log to the next, by name."""
        found = (callback for callback in self.callback_handler.callbacks if hasattr(callback, "log_state"))
        return [(type(callback).__name__, callback) for callback in found]

    def _log_state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"log_state_{self.args.process_index}.json"

    # ---- numbers that are none ----

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; the loss is looked at once the gradients of all micro-batches are there."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batches.append((inputs, loss))
        return torch.where(
            torch.isfinite(loss), loss, torch.zeros_like(loss)
        )  # a step left out adds nothing to the log

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer asks for this before every update: where all that the update is made of is checked."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        total = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        losses = torch.stack([loss for _, loss in self._micro_batches])
        numbers = torch.cat([losses.flatten(), torch.as_tensor(0.0 if total is None else total).to(losses).reshape(1)])
        bad = agree(float(not torch.isfinite(numbers).all()), self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        if not bad:
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        step = self.state.global_step + 1
        report = self._write_bad_batch(step, micro_batches, numbers)
        where = [number for number, (_, loss) in enumerate(micro_batches) if not torch.isfinite(loss).all()]
        norm_of = "the gradient norm" if self.args.world_size == 1 else "the gradient norm, or another process's loss,"
        what = f"the loss of micro-batch {where[0]}" if where else norm_of
        message = f"Step {step}: {what} is not finite; its batch is in {report}"
        if self._skipped_in_a_row <= self.safety.max_skipped_steps:
            self.skipped_steps += 1
            self.optimizer.zero_grad()
            self.say(f"{message}. Left out ({self._skipped_in_a_row} in a row, {self.skipped_steps} in all).")
            return norm
        last = self._newest()
        kept = f"the newest checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteLossError(
            f"{message}. The weights are those of step {step - 1}; {kept}. Look at the batch, "
            "lower `learning_rate`, or let such steps out with `max_skipped_steps`."
        )

    def _write_bad_batch(self, step: int, micro_batches: list, numbers: torch.Tensor) -> Path:
        """The ids of each micro-batch of a step, as JSON."""
        path = Path(str(self.args.output_dir)) / f"not_finite_step_{step}_process_{self.args.process_index}.json"
        ids = [
            {
                name: value.tolist()
                for name, value in inputs.items()
                if torch.is_tensor(value) and not value.is_floating_point() and value.numel() <= BATCH_VALUES_WRITTEN
            }
            for inputs, _ in micro_batches
        ]
        values = [str(number) for number in numbers.tolist()]
        report = {"step": step, "losses": values[:-1], "gradient_norm": values[-1], "micro_batches": ids}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report), encoding="utf-8")
        return path

    # ---- many processes ----

    def _wait(self) -> None:
        if _is_distributed():
            distributed.barrier()

    def _from_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on the main process, on all of them; a ValueError too."""
        result: Any = None
        if self.is_world_process_zero():
            try:
                result = compute()
            except ValueError as error:
                result = error
        if _is_distributed():
            shared = [result]
            distributed.broadcast_object_list(shared, src=0, device=self.args.device)
            result = shared[0]
        if isinstance(result, ValueError):
            raise result
        return result


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
