"""A plain training loop over sharded weights: FSDP2, tensor and expert parallelism, also on CPUs, where Trainer has none.

    torchrun --nproc_per_node 2 my_script.py     # ... which calls `train_in_parallel` in each process

transformers shards the model (`from_pretrained(distributed_config=...)`, by the form's own plans) and writes each process's
part; what is here is the loop, what a checkpoint needs besides to go on exactly, and the way back into one process.
"""

import hashlib
import os
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler
from transformers.distributed import DistributedConfig

from ..model import modeling_variform
from ..model.losses import shift_labels
from ..report.costs import stacks_of
from .checkpoints import changed_facts, commit, newest_committed, prune, read_manifest

Parallel = Literal["fsdp2", "tp", "ep"]
OPTIMIZER, PROGRESS = "optimizer", "progress-{rank}.pt"


class Recipe(NamedTuple):
    """What a run is told; all of it is a fact that a resumed run must repeat, but `steps` and `save_steps`."""

    parallel: Parallel
    steps: int
    batch_size: int  # sequences a step, of all processes
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "linear"  # as in `transformers.get_scheduler`
    warmup_steps: int = 0
    seed: int = 42
    save_steps: int = 500
    keep: int = 2  # checkpoints


class Trained(NamedTuple):
    """What a run leaves in memory."""

    model: PreTrainedModel
    losses: list[float]  # of each step of this run, the same in all processes
    state_hash: str  # of parameters, optimizer, scheduler and random numbers of all processes


def train_in_parallel(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    recipe: Recipe,
    *,
    auto_class: Any = AutoModelForCausalLM,
    collate: Any = None,
    resume: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Trains a saved model in all processes that torchrun started; each step is the step of one process with the whole batch.

    Under "tp" every process reads the whole batch, under "fsdp2" and "ep" its own rows.

    Args:
        source: a folder, or a repo on the Hub, with the model to start from.
        dataset: with a length, and for each number a dict of tensors without the batch, `labels` among them.
        output_dir: gets `checkpoint-N/`: `model/` sharded, the optimizer, and what each process knew.
        auto_class: the head.
        collate: makes a batch of examples. Default: stacks them.
        resume: go on from the newest committed checkpoint, if there is one.
        on_step: is told each step of this run, from 1 on, and its loss, in every process.

    Raises:
        ValueError: for a batch that the processes cannot share, a recipe that is not the checkpoint's, a model of which no
            weight was sharded, or where torchrun did not start this process.
    """
    rank, world = join_processes()
    check(recipe, len(dataset), world)
    output_dir, facts = Path(output_dir), facts_of(recipe, dataset, world)
    checkpoint = agree(newest_committed(output_dir).checkpoint if resume and rank == 0 else None)
    if checkpoint is not None:
        refuse_changes(checkpoint, facts)
    sizes: dict[str, Any] = {
        "fsdp2": {"fsdp_size": world},
        "tp": {"tp_size": world},
        "ep": {"fsdp_size": world, "ep_size": world},
    }
    model = auto_class.from_pretrained(source, distributed_config=DistributedConfig(**sizes[recipe.parallel])).train()
    refuse_whole_weights(model, recipe.parallel)
    refuse_moved_biases(model)
    # One parameter at a time: sharded and whole ones cannot be in one call
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=False
    )
    scheduler = get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, recipe.steps)
    readers = 1 if recipe.parallel == "tp" else world
    torch.manual_seed(recipe.seed + (0 if readers == 1 else rank))  # dropout: one batch, one mask
    done = 0
    if checkpoint is not None:
        done = load(checkpoint, model, optimizer, scheduler, rank)
    losses = []
    for step in range(done, recipe.steps):
        batch = [dataset[number] for number in numbers_of(step, len(dataset), recipe)]
        share = batch[rank * len(batch) // readers : (rank + 1) * len(batch) // readers] if readers > 1 else batch
        items = torch.tensor(count_targets(batch, model)) / readers
        given = (collate or stack)(share)
        loss = model(**to_device(given, model), num_items_in_batch=items).loss
        loss.backward()
        clip(model, recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(mean_over(loss.detach(), readers))
        if on_step is not None:
            on_step(step + 1, losses[-1])
        if (step + 1) % recipe.save_steps == 0 or step + 1 == recipe.steps:
            save(output_dir, step + 1, model, optimizer, scheduler, rank, facts)
            if rank == 0:
                prune(output_dir, recipe.keep)
    return Trained(model, losses, state_hash(model, optimizer, scheduler))


def join_processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if "RANK" not in os.environ:
        raise ValueError("`RANK` is unset: start the script with `torchrun --nproc_per_node 2 script.py ...`.")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def check(recipe: Recipe, length: int, world: int) -> None:
    """Refuses a recipe that these processes cannot follow."""
    if recipe.parallel not in get_args(Parallel):
        raise ValueError(f"`parallel={recipe.parallel!r}` must be one of {', '.join(get_args(Parallel))}.")
    if recipe.parallel != "tp" and recipe.batch_size % world:
        raise ValueError(
            f"`batch_size={recipe.batch_size}` must be a multiple of the {world} processes that share it."
        )
    if length < recipe.batch_size:
        raise ValueError(f"`batch_size={recipe.batch_size}` is more than the {length} examples of the data.")


def facts_of(recipe: Recipe, dataset: Sized, world: int) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it."""
    facts = {name: value for name, value in recipe._asdict().items() if name not in ("save_steps", "keep")}
    return {**facts, "world_size": world, "examples": len(dataset)}


def refuse_changes(checkpoint: Path, facts: dict[str, Any]) -> None:
    changes = changed_facts(read_manifest(checkpoint)["facts"], facts)
    if changes:
        listed = "; ".join(f"`{name}` was {old!r} and is {new!r}" for name, (old, new) in changes.items())
        raise ValueError(
            f"{checkpoint} cannot be gone on from exactly: {listed}. Restore them, or pass `resume=False`."
        )


def refuse_whole_weights(model: PreTrainedModel, parallel: str) -> None:
    """Raises `ValueError` where nothing was sharded: that would be data parallelism under another name, or less."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"`parallel={parallel!r}` sharded no weight of {type(model).__name__}: it has no plan for that."
        )


def refuse_moved_biases(model: PreTrainedModel) -> None:
    """Raises `ValueError` for routers whose biases a callback of Trainer's would move."""
    stacks = stacks_of(model.config).values()
    if any(own.num_experts and own.router_type == "sigmoid_bias" and own.router_bias_update_rate for own in stacks):
        raise ValueError(
            "`router_type='sigmoid_bias'` is kept even by moving its biases after each step, which this loop does not: set "
            "`router_bias_update_rate=0` and a `router_aux_loss_coef`, or train data parallel, through Trainer."
        )


def agree(path: Path | None) -> Path | None:
    """What the first process found: another one might see a folder a moment later."""
    found = [path]
    dist.broadcast_object_list(found)
    return found[0]


def numbers_of(step: int, length: int, recipe: Recipe) -> list[int]:
    """The examples of a step: a new order each epoch, that follows from the seed alone. What fills no batch is left out."""
    epoch, place = divmod(step, length // recipe.batch_size)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(recipe.seed + epoch))
    return order[place * recipe.batch_size : (place + 1) * recipe.batch_size].tolist()


def stack(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Examples of one length as a batch."""
    return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in examples[0]}


def count_targets(batch: Sequence[dict[str, Any]], model: PreTrainedModel) -> int:
    """The labels that count in a step, by which the loss is divided."""
    labels = [torch.as_tensor(example["labels"]) for example in batch]
    if model.config.model_type == "variform_decoder":
        labels = [shift_labels(own) for own in labels]
    return sum(int((own != -100).sum()) for own in labels)


def to_device(batch: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def clip(model: PreTrainedModel, most: float) -> None:
    """Shrinks all gradients so that their common norm is `most` at most; sharded over whatever meshes."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    squares = [whole(torch.linalg.vector_norm(grad)).square() for grad in grads]
    norm = torch.stack(squares).sum().sqrt()
    for grad in grads:
        local(grad).mul_((most / (norm + 1e-6)).clamp(max=1.0))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over(loss: torch.Tensor, readers: int) -> float:
    """A loss of the whole batch: that of all processes' rows."""
    if readers > 1:
        dist.all_reduce(loss)
    return float(loss) / readers


def save(output_dir: Path, step: int, model, optimizer, scheduler, rank: int, facts: dict[str, Any]) -> None:
    """Writes a checkpoint, each process its part; it counts once the first has committed it."""
    from transformers.distributed.checkpoint import save_optimizer_distributed

    folder = output_dir / f"checkpoint-{step}"
    model.save_pretrained(folder / "model", distributed_checkpoint=True)
    save_optimizer_distributed(model, optimizer, str(folder / OPTIMIZER))
    progress = {"step": step, "scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
    torch.save(progress, folder / PROGRESS.format(rank=rank))
    dist.barrier()
    if rank == 0:
        commit(folder, facts)
    dist.barrier()


def load(checkpoint: Path, model, optimizer, scheduler, rank: int) -> int:
    """Gives model, optimizer, scheduler and random numbers what they had; returns the steps that are done."""
    from transformers.distributed.checkpoint import _load_model_checkpoint_distributed, load_optimizer_distributed

    # Into the shards of a model that was loaded as it was at first, packed ones put back in their order: from_pretrained of a
    # sharded folder (transformers 5.23) leaves tied weights that can be saved no more
    _load_model_checkpoint_distributed(model, checkpoint / "model")
    load_optimizer_distributed(model, optimizer, str(checkpoint / OPTIMIZER))
    progress = torch.load(checkpoint / PROGRESS.format(rank=rank))
    scheduler.load_state_dict(progress["scheduler"])
    torch.set_rng_state(progress["random"])
    return progress["step"]


def state_hash(model: PreTrainedModel, optimizer: Any, scheduler: Any) -> str:
    """One hash of all that decides how a run goes on, of all processes, bit by bit."""
    digest = hashlib.sha256(repr(sorted(scheduler.state_dict().items(), key=str)).encode())
    for parameter in model.parameters():
        states = [value for _, value in sorted(optimizer.state[parameter].items())]
        for value in (parameter, *states):
            numbers = local(torch.as_tensor(value)).detach().cpu().reshape(-1).contiguous()
            digest.update(numbers.view(torch.uint8).numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    hashes = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, digest.hexdigest())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def to_one_process(checkpoint: str | Path, out: str | Path) -> PreTrainedModel:
    """Puts a sharded checkpoint together, in one process: `out` becomes an ordinary folder for `from_pretrained`.

    Args:
        checkpoint: a `checkpoint-N` of `train_in_parallel`.

    Raises:
        ValueError: if it was never committed.
    """
    try:
        read_manifest(checkpoint)
    except ValueError as reason:
        raise ValueError(f"{checkpoint} is no checkpoint to go by: {reason}.") from None
    folder = Path(checkpoint) / "model"
    model_class = getattr(modeling_variform, AutoConfig.from_pretrained(folder).architectures[0])
    model = model_class.from_pretrained(folder)
    model.save_pretrained(out)
    return model
