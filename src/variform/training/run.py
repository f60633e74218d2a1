"""The course of a script: how a run starts, goes on, ends, and is described. The scripts say what is learned from what."""

import gc
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.utils.logging import disable_progress_bar

from ..hub.cards import CardFacts, environment, form_facts, write_card_or_warn
from ..hub.paths import model_name
from ..hub.pictures import draw_pictures
from ..report.curves import draw_curves
from ..report.plan import describe, plan
from .budget import TimeBudget
from .checkpoints import RunLock, is_trained
from .logs import RunLog
from .lora import adapters_in_words
from .options import ModelArguments, RunArguments
from .progress import ProgressReport
from .routers import watch_experts
from .safety import Safety
from .speed import StepTimer
from .sweep import is_swept
from .train_config import given_of, read_train_config, refuse_other_training, write_train_config

STOPPED = 130  # the exit status of a run that was stopped and can go on
# What the command line did not say and TrainingArguments would leave to chance: nothing is sent anywhere, every parameter of
# every form has a gradient in every step, and there is a bar of our own
DEFAULTS = {
    "report_to": "none",
    "ddp_find_unused_parameters": "false",
    "disable_tqdm": "true",
    "save_total_limit": "2",
    "seed": "0",
    "logging_steps": "50",
}


def defaults(**more: str) -> dict[str, str]:
    """What scripts say instead of the defaults of TrainingArguments, for `parse_recipe`; `more` is said by one of them."""
    if torch.accelerator.is_available():
        return {**DEFAULTS, **more}
    # Unless told that the CPU is meant, Trainer ignores the other processes of torchrun where there is only a CPU
    return {**DEFAULTS, "use_cpu": "true", "dataloader_pin_memory": "false", **more}


def run_script(main: Callable[[list[str]], int]) -> None:
    """Run `main` on the command line and exit with the status it returns; a mistake of the user ends with one sentence."""
    # PEFT and trl use a name of transformers that is to change: nothing that a user could mend
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to go on.", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ArithmeticError) else 2)
    finally:
        leave_group()


def refuse_run(options: RunArguments, training: TrainingArguments) -> None:
    """What Trainer would take for something else, or find out late.

    Raises:
        ValueError: naming the argument.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(training, name)}.")
    if training.max_steps == 0 or training.max_steps < -1:
        raise ValueError(f"`max_steps` must be at least 1, or -1 for whole epochs, got {training.max_steps}.")
    if training.num_train_epochs <= 0:
        raise ValueError(f"`num_train_epochs` must be above 0, got {training.num_train_epochs:g}.")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in ("none", *installed):
            raise ValueError(f"`report_to={name}` is not installed; there are {', '.join(['none', *installed])}.")
    if options.resume not in ("auto", "none") and not Path(options.resume).is_dir():
        raise ValueError(
            f"`resume={options.resume}` must be auto, none, or the folder of a checkpoint; it is no folder."
        )


def leave_group() -> None:
    """Ends what joins this process to others: threads that still wait for them would end it with an abort."""
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # first what uses the group, such as the wrapper of a model that is trained in parallel
        distributed.destroy_process_group()


class Run:
    """One run of a script: its folder, its console, and what all scripts do before, while and after they train.

    Only one process at a time may write to a folder: making a Run takes its lock, and refuses while another holds it.

    Args:
        options: the arguments of the run. training: Trainer's.
        script: `__file__` of the script. argv: its command line.
        others: the other parts of what `parse_recipe` gave, for `train_config.yaml`.
        counts_tokens: count the tokens that were seen; a Trainer whose batches have no `input_ids` cannot.

    Attributes:
        folder: the output folder.
        console: of the main process; quiet elsewhere.
        trained: the folder, where a run came to its end there that is not to be taken up again; else None.

    Raises:
        ValueError: where the folder cannot be written, or another run is at work there; for a grid, which is many runs.
    """

    def __init__(
        self,
        options: RunArguments,
        training: TrainingArguments,
        *,
        script: str,
        argv: Sequence[str],
        others: Sequence[Any],
        counts_tokens: bool = True,
    ):
        refuse_run(options, training)
        if is_swept(options):
            raise ValueError("`sweep` is for scripts that train new models: causal_lm.py, masked_lm.py, seq2seq.py.")
        given = given_of([*others, options, training])  # before some of Trainer's are changed below
        self.options, self.training = options, training
        self.base_name = next((part.model for part in others if isinstance(part, ModelArguments)), None)
        self.folder = Path(str(training.output_dir))
        self.command = [*launcher(training.world_size), f"finetune/{Path(script).name}", *argv]
        self.console = Console(quiet=training.process_index > 0, markup=False, highlight=False, soft_wrap=True)
        if options.minutes:  # the clock ends the training
            training.max_steps, training.num_train_epochs = -1, 1_000_000
        training.include_num_input_tokens_seen = "non_padding" if counts_tokens else "no"
        set_seed(training.seed)
        disable_progress_bar()  # the ones for loading and saving a file; ours stays
        if not self.console.is_terminal or training.process_index > 0:
            datasets.disable_progress_bars()  # those of reading and tokenizing: nobody watches them grow
        self.timer = StepTimer()
        writes = training.process_index == 0 and not options.dry_run
        self._held = ExitStack()
        if writes:
            self._held.enter_context(RunLock(self.folder))  # until this process ends
        self.trained = self.folder if options.resume == "auto" and is_trained(self.folder) else None
        if self.trained is not None and (found := read_train_config(self.trained)):
            self.command, before = found
            for note in refuse_other_training(self.trained, before, given, options.allow_resume_changes):
                self.console.print(note)
        elif writes and self.trained is None:
            write_train_config(self.folder, self.command, given)

    def show_plan(self, model: Any, auto_class: Any, length: int, *, besides: Mapping[str, Any] | None = None) -> int:
        """What a dry run prints; returns the exit status.

        Args:
            besides: other models that are in memory and are not trained, by what they are, or None.
        """
        args, adapters = self.training, getattr(model, "peft_config", {})
        found = plan(
            model.config,
            auto_class=auto_class,
            batch_size=args.per_device_train_batch_size,
            length=length,
            optimizer="adafactor" if args.optim == "adafactor" else "sgd" if args.optim == "sgd" else "adamw",
            gradient_checkpointing=bool(args.gradient_checkpointing),
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            device="cpu" if args.use_cpu else "cuda",
            adapter=next(iter(adapters.values()), None),
        )
        self.console.print(describe(found))
        for name, other in (besides or {}).items():
            size = sum(parameter.nbytes for parameter in other.parameters())
            self.console.print(
                f"Besides, the weights of the {name}: {size / 1e9:,.3f} GB, and what its forward takes."
            )
        self.console.print("Nothing was trained or written: this was a dry run.")
        return 0

    def say(self, facts: Mapping[str, str], report: Mapping[str, int]) -> None:
        """Tell what the data is, and what tokenizing cut or dropped."""
        for what, fact in facts.items():
            self.console.print(f"{what[0].upper()}{what[1:]}: {fact}.")
        for what, count in report.items():
            if count:
                self.console.print(f"Examples {what}: {count:,}.")

    def show_scores(
        self, title: str, scores: Mapping[str, float], *, digits: int = 2, note: str | None = None
    ) -> None:
        """Print a table of scores, the first of them this model's."""
        table = Table(title=title, caption=note, show_header=False)
        table.add_column("")
        table.add_column("", justify="right")
        for name, value in scores.items():
            table.add_row(name, f"{value:.{digits}f}")
        self.console.print(table)

    def trainer(self, trainer_class: Any, *, callbacks: Sequence[Any] = (), **kwargs: Any) -> Any:
        """A Trainer of a class with `SafeTraining` in it, told how this run behaves.

        Args:
            kwargs: as for the Trainer, without `args`.
        """
        options, args = self.options, self.training
        budget = None
        if options.minutes:
            # As a number below 1, `warmup_steps` is a part of the training, whether time or steps end it
            ratio = args.warmup_steps if 0 < args.warmup_steps < 1 else 0.02
            budget = TimeBudget(options.minutes, clock=options.clock, warmup_ratio=ratio)
        trainer = trainer_class(
            args=args,
            budget=budget,
            base_name=self.base_name,
            safety=Safety(
                max_skipped_steps=options.max_skipped_steps,
                on_save_error=options.on_save_error,
                stop_on_divergence=options.stop_on_divergence,
                verify=options.checkpoint_verify,
            ),
            callbacks=[self.timer, ProgressReport(budget), *callbacks],
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.callback_handler.callbacks.insert(0, RunLog())  # before those that report what is logged
        return trainer

    def train(self, trainer: Any) -> bool:
        """Train from the newest whole checkpoint there is and save the model; a run that came to its end is read back.

        Routers, if the model has any, are balanced and watched (`watch_experts`).

        Returns:
            False when a signal stopped the training; all that is needed to go on is saved then.
        """
        watch_experts(trainer)
        if self.trained is None:
            size, device = trainer.model.num_parameters(), self.training.device
            self.console.print(f"Model: {size:,} parameters, on {device}.")
        if not trainer.train_safely(self.options.resume, allow_changes=self.options.allow_resume_changes):
            return False
        self.timer.restore(trainer.state)
        return True

    def finish(self, trainer: Trainer, measured: Mapping[str, Any], make_card: Callable[[], CardFacts]) -> None:
        """Write what is to be kept of the run: `metrics.json`, curves, pictures, and the card, whose failure is a warning.

        Args:
            measured: the figures of the run, whatever a comparison with another run needs.
            make_card: what the script knows about its model; see `card`.
        """
        if not trainer.is_world_process_zero():
            return
        text = json.dumps({**measured, **self.costs(trainer)}, indent=2) + "\n"
        (self.folder / "metrics.json").write_text(text, encoding="utf-8")
        pictures = [draw_curves(self.folder), *draw_pictures(self.folder)]
        write_card_or_warn(self.folder, make_card)
        shown = ", ".join(str(path) for path in pictures if path is not None)
        self.console.print(
            f"Model, card and metrics.json are in {self.folder}.{f' Pictures: {shown}.' if shown else ''}"
        )

    def costs(self, trainer: Trainer) -> dict[str, Any]:
        """Sizes and times of the run."""
        state, timer = trainer.state, self.timer
        return {
            "seed": self.training.seed,
            "parameters": trainer.model.num_parameters(),
            "steps": state.global_step,
            "tokens_seen": int(state.num_input_tokens_seen),
            "seconds": round(timer.seconds, 1),
            "process_seconds": round(timer.process_seconds, 1),
        }

    def card(self, trainer: Trainer, *, auto_class: Any, **facts: Any) -> CardFacts:
        """The card's facts: those that every run knows, and `facts`, which the script adds."""
        model: Any = trainer.model
        return CardFacts(
            name=self.folder.name,
            auto_class=auto_class.__name__,
            training={**self.training_facts(trainer), **environment()},
            command=shlex.join(self.command),
            **{"base_model": model_name(self.base_name or ""), **sizes_and_form(model), **facts},
            adapters=adapters_in_words(model),
        )

    def training_facts(self, trainer: Trainer) -> dict[str, str]:
        """Size, steps and time of a run, for a model card."""
        args, state = self.training, trainer.state
        examples = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        epochs = f"{state.epoch:.1f}" if state.epoch >= 0.1 else f"{state.epoch:.1g}"
        facts = {"steps": f"{state.global_step:,} of {examples} examples ({epochs} epochs)"}
        if state.num_input_tokens_seen:
            name = "tokens of sources" if trainer.model.config.is_encoder_decoder else "tokens"
            facts[name] = f"{int(state.num_input_tokens_seen):,}, padding left out"
        if args.world_size > 1:
            facts["processes"] = f"{args.world_size}"
        if self.timer.steps:
            wall, process = (in_minutes(seconds) for seconds in (self.timer.seconds, self.timer.process_seconds))
            facts["training time"] = f"{wall}, {process} of one core"
        return facts


def in_minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def sizes_and_form(model: Any) -> dict[str, Any]:
    """`form_facts` of a model, whose head and adapters count: the form alone does not say which it has."""
    facts = form_facts(model.config)
    if facts:
        more = model.num_parameters() - facts["parameters"]
        facts |= {name: facts[name] + more for name in ("parameters", "active_parameters")}
    return facts


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes."""
    return ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
