"""What the scripts in finetune/ have in common: how a run starts, goes on, ends, and is described."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import distributed
from transformers import Trainer, TrainerState

from .interruption import SaveOnInterrupt, last_checkpoint
from .routers import watch_experts


def run_script(main: Callable[[list[str]], int]) -> None:
    """Run `main` on the command line and exit with the status it returns; a mistake of the user ends with one sentence."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Stopped. Run the same command again to go on.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_group()


def leave_group() -> None:
    """Ends what joins this process to others: threads that still wait for them would end it with an abort."""
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # first what uses the group, such as the wrapper of a model that is trained in parallel
        distributed.destroy_process_group()


def device_flags() -> list[str]:
    """Flags of TrainingArguments for this machine, to be put before those of the user."""
    # Unless told that the CPU is meant, Trainer ignores the other processes of torchrun where there is only a CPU
    return [] if torch.accelerator.is_available() else ["--use_cpu", "true"]


def is_trained(folder: str | Path) -> bool:
    """Whether a run in `folder` came to its end."""
    return (Path(folder) / "model.safetensors").is_file()


def train(trainer: Trainer, interruption: SaveOnInterrupt, console: Console) -> bool:
    """Train from the last checkpoint there is and save the model; a run that came to its end is only read back.

    Routers, if the model has any, are balanced and watched (`watch_experts`).

    Returns:
        False when Ctrl-C stopped the training; all that is needed to go on is saved then.
    """
    folder = Path(str(trainer.args.output_dir))
    if is_trained(folder):
        console.print(f"{folder} holds a trained model: delete that folder to train again.")
        trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        return True
    checkpoint = last_checkpoint(folder)
    watch_experts(trainer)
    console.print(f"Going on from {checkpoint}." if checkpoint else "Training. Ctrl-C stops and saves.")
    seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    if interruption.interrupted:
        console.print(f"Stopped and saved in {last_checkpoint(folder)}. Run the same command again to go on.")
        return False
    console.print(f"Trained in {seconds / 60:.1f} min, {trainer.state.global_step:,} steps.")
    trainer.save_state()
    trainer.save_model()
    return True


def training_facts(trainer: Trainer) -> dict[str, str]:
    """Size, steps and time of a run, for a model card."""
    args, state = trainer.args, trainer.state
    spent = state.stateful_callbacks.get("TimeBudget", {}).get("attributes")
    minutes = "{:.1f} min by the clock of the budget, {:.1f} min of one core"
    return {
        "parameters": f"{trainer.model.num_parameters():,}",
        "steps": f"{state.global_step:,} of {args.train_batch_size * args.world_size} examples "
        f"({state.epoch:.1f} epochs)",
        **({"processes": f"{args.world_size}, a core each"} if args.world_size > 1 else {}),
        **({"training time": minutes.format(*(spent[clock] / 60 for clock in spent))} if spent else {}),
    }


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes."""
    return ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
