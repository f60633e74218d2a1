"""What a training step of a form takes, before it is run: memory and arithmetic, of one process in any layout of several."""

import copy
import fnmatch
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..forms import from_config, load_config
from .costs import default_length, idle_parameters, stacks_of
from .dry_step import run_dry_step
from .form import units

Optimizer = Literal["adamw", "sgd", "adafactor"]
Parallel = Literal["ddp", "fsdp2", "tp", "ep", "zero2", "zero3"]
Device = Literal["cuda", "cpu"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}
# Memory of usual accelerators, in GB of 10**9 bytes, and the part of it that a framework, fragments and kernels leave
DEVICES = (8, 16, 24, 40, 80)
USABLE = 0.9
# Logits that the loss holds at a time on an accelerator, in float32 with their gradients
CHUNK_LOGITS = {"cuda": 2**27, "cpu": 3 * 2**21}
# Units of memory, the largest first
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
# Styles of transformers' plan by which each process holds a part of a weight
SPLITTING = ("colwise", "rowwise", "packed", "embedding_rowwise", "grouped_gemm")
# A bias is split where its output is
KEEPS_BIAS = ("rowwise", "rowwise_split_input")


class Plan(NamedTuple):
    """What a training step takes. Bytes are those of the process that holds most, FLOPs those of one process's batch."""

    parameters: int  # of the whole model; a tied matrix and a shared layer count once
    active_parameters: int  # the same without the experts that a token leaves idle
    trained_parameters: int  # all, or those of an adapter
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    traffic_bytes: int  # what the layout holds besides: DDP's buckets, or weights that are gathered to be used
    activation_bytes: int  # what the forward keeps for the backward, and one layer of it that checkpointing makes anew
    loss_bytes: int  # the logits that the loss holds at a time
    forward_flops: int
    backward_flops: int  # with what checkpointing computes anew
    tokens_per_step: int  # of all processes; an encoder-decoder's target tokens
    batch_size: int
    length: int
    accumulation: int
    processes: int
    parallel: Parallel
    device: Device
    dtype: torch.dtype
    optimizer: Optimizer
    gradient_checkpointing: bool
    tokens: int | None  # of the budget
    flops_per_second: float | None  # that one device reaches

    @property
    def state_bytes(self) -> int:
        """What does not grow with the batch."""
        kinds = (
            self.parameter_bytes,
            self.buffer_bytes,
            self.gradient_bytes,
            self.optimizer_bytes,
            self.traffic_bytes,
        )
        return sum(kinds)

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.loss_bytes

    @property
    def step_flops(self) -> int:
        """Of all processes."""
        return (self.forward_flops + self.backward_flops) * self.accumulation * self.processes

    @property
    def steps(self) -> int | None:
        """That the token budget is worth."""
        return None if self.tokens is None else math.ceil(self.tokens / self.tokens_per_step)

    @property
    def gpu_days(self) -> float | None:
        """Of all devices together."""
        if self.steps is None or self.flops_per_second is None:
            return None
        return self.steps * self.step_flops / self.flops_per_second / 86400

    def largest_batch(self, gigabytes: float) -> int:
        """How many sequences a device of so much memory can take at once; 0 where the model alone is too large."""
        room = gigabytes * 1e9 * USABLE - self.state_bytes - self.loss_bytes
        return max(0, int(room // (self.activation_bytes / self.batch_size)))


def plan(
    config: PreTrainedConfig | Mapping[str, Any] | str | PathLike,
    *,
    auto_class: Any = None,
    batch_size: int = 1,
    length: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    processes: int = 1,
    parallel: Parallel = "ddp",
    tokens: int | None = None,
    flops_per_second: float | None = None,
    device: Device = "cuda",
    adapter: Any = None,
) -> Plan:
    """What training a form takes, without memory for it; seconds for a model of 70 billion parameters.

    Parameters, gradients and optimizer state are exact. Activations are those that the form's own code keeps in a step
    without numbers (`dry_step`), and FLOPs are counted there as torch's counter does: attention with all of a dense layer's
    pairs, causal or not, block-sparse attention with the pairs of its tiles.

    Args:
        config: a config of the family, or what `from_config` takes.
        auto_class: the head, for its parameters; the step is that of the language-model head. Default: that head.
        batch_size, length: sequences a process and forward, and tokens of each. Default length: `default_length(config)`.
        dtype: of parameters, gradients and activations.
        optimizer: AdamW holds two numbers a parameter, SGD without momentum none, Adafactor (transformers') a row and a column
            a matrix.
        accumulation: forwards a step.
        processes, parallel: how many, and what they share out: "ddp" nothing; "zero2" optimizer and gradients; "fsdp2" and
            "zero3" parameters too; "tp" the widths of layers; "ep" experts, and the rest as "fsdp2".
        tokens, flops_per_second: of the training, and of one device.
        device: whose kernels: on a "cpu", dropout keeps more.
        adapter: a config of PEFT, such as a `LoraConfig`, of what is trained in place of the model.

    Raises:
        ValueError: naming the argument, its value and the mend; for a layout that the form cannot have, naming the field.
    """
    config = copy.deepcopy(config) if isinstance(config, PreTrainedConfig) else read(config)
    length = default_length(config) if length is None else length
    number_type: Any = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    check_choices(optimizer=(optimizer, Optimizer), parallel=(parallel, Parallel), device=(device, Device))
    if number_type not in DTYPES.values():
        raise ValueError(f"`dtype={dtype}` must be one of {', '.join(DTYPES)}.")
    for name, value in {
        "batch_size": batch_size,
        "length": length,
        "accumulation": accumulation,
        "processes": processes,
    }.items():
        if value < 1:
            raise ValueError(f"`{name}={value}` must be at least 1.")
    for name, amount in {"tokens": tokens, "flops_per_second": flops_per_second}.items():
        if amount is not None and amount <= 0:
            raise ValueError(f"`{name}={amount}` must be above 0.")
    for side, stack in stacks_of(config).items():
        if stack.longest_table is not None and length > stack.longest_table:
            raise ValueError(
                f"`length={length}` exceeds the {stack.longest_table} learned positions of the {side}; plan shorter sequences, "
                "or lengthen the table with `variform surgery sparsify`."
            )
    check_layout(config, parallel, processes, adapter)
    plain = build(config, auto_class, number_type)
    model = plain if adapter is None else adapted(build(config, auto_class, number_type), adapter)
    shards = share_out(model, parallel, processes)
    sizes = [(parameter, shards[name]) for name, parameter in model.named_parameters() if parameter.requires_grad]
    runs = step_model(config, parallel, processes, number_type, adapter)
    step = run_dry_step(runs, batch_size, length, device=device, gradient_checkpointing=gradient_checkpointing)
    bytes_of = {
        name: numel(shape) * parameter.itemsize for (name, shape), parameter in zip(shards.items(), model.parameters())
    }
    whole = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter, _ in sizes)
    gradients = sum(numel(shape) * parameter.itemsize for parameter, shape in sizes)
    state = sum(optimizer_bytes(optimizer, shape, parameter.dtype) for parameter, shape in sizes)
    shard = sum(math.ceil(parameter.nbytes / processes) for parameter, _ in sizes)
    if parallel in ("zero2", "zero3"):
        gradients = shard
        # DeepSpeed flattens the parameters and, of others than float32, has a copy of its own
        part = (math.ceil(trained / processes),)
        state = optimizer_bytes(optimizer, part, torch.float32)
        state += 4 * numel(part) if number_type != torch.float32 else 0
    vocab = stacks_of(config)["decoder" if config.is_encoder_decoder else next(iter(stacks_of(config)))].vocab_size
    replicas = 1 if parallel == "tp" else processes
    return Plan(
        parameters=plain.num_parameters(),
        active_parameters=plain.num_parameters() - idle_parameters(plain),
        trained_parameters=trained,
        parameter_bytes=whole if parallel == "zero2" else sum(bytes_of.values()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        gradient_bytes=gradients,
        optimizer_bytes=state,
        traffic_bytes=traffic(model, parallel, processes),
        activation_bytes=step.kept_bytes + (step.layer_bytes if gradient_checkpointing else 0),
        loss_bytes=4 * min(batch_size * length * vocab, max(CHUNK_LOGITS[device], 96 * vocab)),
        forward_flops=step.forward_flops,
        backward_flops=step.backward_flops,
        tokens_per_step=batch_size * length * accumulation * replicas,
        batch_size=batch_size,
        length=length,
        accumulation=accumulation,
        processes=processes,
        parallel=parallel,
        device=device,
        dtype=number_type,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        tokens=tokens,
        flops_per_second=flops_per_second,
    )


def read(form: Mapping[str, Any] | str | PathLike) -> PreTrainedConfig:
    with torch.device("meta"):
        return from_config(form).config if isinstance(form, Mapping) else load_config(form)


def build(config: PreTrainedConfig, auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights, in training mode."""
    with torch.device("meta"):
        return from_config(copy.deepcopy(config), auto_class=auto_class, dtype=dtype).train()


def adapted(model: PreTrainedModel, adapter: Any) -> PreTrainedModel:
    """The model with the layers of an adapter inside it, which alone are trained; of a head that it does not have, nothing."""
    from peft import get_peft_model  # an extra

    adapter = copy.deepcopy(adapter)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    adapter.modules_to_save = [name for name in adapter.modules_to_save or [] if name in names] or None
    adapter.task_type = None
    return get_peft_model(model, adapter).get_base_model()


def check_choices(**choices: Any) -> None:
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise ValueError(f"`{name}={value!r}` must be one of {', '.join(get_args(kind))}.")


def check_layout(config: PreTrainedConfig, parallel: Parallel, processes: int, adapter: Any) -> None:
    """Refuses a layout whose parts are not whole."""
    if adapter is not None and parallel in ("tp", "ep"):
        raise ValueError(
            f"`parallel={parallel!r}` shares out whole weights, and an `adapter` trains beside them; use 'fsdp2'."
        )
    for side, stack in stacks_of(config).items():
        if parallel == "ep" and stack.num_experts % processes:
            raise ValueError(
                f"`processes={processes}` must divide `num_experts={stack.num_experts}` of the {side} for `parallel='ep'`."
            )
        if parallel == "tp":
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
                if getattr(stack, name) % processes:
                    raise ValueError(
                        f"`processes={processes}` must divide `{name}={getattr(stack, name)}` of the {side} for "
                        "`parallel='tp'`."
                    )
    if parallel == "ep" and not any(stack.num_experts for stack in stacks_of(config).values()):
        raise ValueError(
            "`parallel='ep'` shares out experts, and the form has none: set `num_experts`, or take 'fsdp2'."
        )


def step_model(
    config: PreTrainedConfig, parallel: Parallel, processes: int, dtype: Any, adapter: Any
) -> PreTrainedModel:
    """What one process runs: under tensor parallelism, a form with its share of heads and inner width."""
    if parallel == "tp":
        config = copy.deepcopy(config)
        for stack in stacks_of(config).values():
            narrow(stack, processes)
    model = build(config, None, dtype)
    return model if adapter is None else adapted(model, adapter)


def narrow(stack: PreTrainedConfig, processes: int) -> None:
    """Leaves a stack the share of one process, of its vocabulary too; where
    heads have data of their own, each process computes all of them."""
    styles = {name.rpartition(".")[2]: style for name, style in stack.base_model_tp_plan.items()}
    names = ["intermediate_size"]
    if styles["q_proj"] == "colwise":
        names += ["num_attention_heads", "num_key_value_heads"]
    if stack.num_experts:
        names.append("moe_intermediate_size")
    for name in names:
        setattr(stack, name, getattr(stack, name) // processes)
    stack.vocab_size = math.ceil(stack.vocab_size / processes)


def share_out(model: PreTrainedModel, parallel: Parallel, processes: int) -> dict[str, tuple[int, ...]]:
    """The shape of the part of each parameter that the first process holds, which is the largest."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if processes == 1 or parallel in ("ddp", "zero2"):
        return shapes
    if parallel == "zero3":
        return {name: (math.ceil(numel(shape) / processes),) for name, shape in shapes.items()}
    if parallel == "tp":
        return {name: split_by_style(name, shape, model.tp_plan, processes) for name, shape in shapes.items()}
    # Experts are whole and each process has some; all other weights are split along their first axis, as these are
    return {name: split(shape, 0, processes) for name, shape in shapes.items()}


def split_by_style(name: str, shape: tuple[int, ...], styles: Mapping[str, str], processes: int) -> tuple[int, ...]:
    """The part of a parameter that transformers' plan of tensor parallelism leaves a process."""
    module, _, kind = name.rpartition(".")
    own = {key: style for key, style in styles.items() if matches(key, name)}
    style = next(iter(own.values()), None)
    if style is None:
        style = next((value for key, value in styles.items() if matches(key, module)), None)
    if style is None or not style.startswith(SPLITTING) or (kind == "bias" and style in KEEPS_BIAS):
        return shape
    if len(shape) == 1:
        return split(shape, 0, processes)
    if style == "embedding_rowwise":
        return split(shape, 0, processes)
    # The output of a matrix is its last axis but one, with or without experts in front; its input is the last
    return split(shape, len(shape) - (1 if "rowwise" in style else 2), processes)


def matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def split(shape: tuple[int, ...], axis: int, processes: int) -> tuple[int, ...]:
    """The largest part of a tensor that is cut along an axis."""
    if not shape:
        return shape
    return (*shape[:axis], math.ceil(shape[axis] / processes), *shape[axis + 1 :])


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def optimizer_bytes(optimizer: Optimizer, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What an optimizer remembers of one parameter."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * numel(shape) * dtype.itemsize + 4  # ... and the number of steps, a float32
    if len(shape) < 2:
        return 4 * numel(shape) + 4  # ... and the root mean square of the parameter
    return 4 * (numel(shape[:-1]) + numel((*shape[:-2], shape[-1]))) + 4


def traffic(model: PreTrainedModel, parallel: Parallel, processes: int) -> int:
    """What a layout holds besides the parts: copies to send, and weights while they are whole."""
    if processes == 1 or parallel == "tp":
        return 0
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if parallel == "ddp":
        return trained  # the buckets in which gradients travel
    if parallel == "zero2":
        return 0
    # The layer at work and the one fetched ahead, beside what is in no layer; experts stay where they are
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList) and is_stack(module)]
    of_layers = [size_of(layer, parallel) for stack in layers for layer in stack]
    return size_of(model, parallel) - sum(of_layers) + 2 * max(of_layers)


def is_stack(module: nn.ModuleList) -> bool:
    return hasattr(module[0], "self_attn")


def size_of(module: nn.Module, parallel: Parallel) -> int:
    return sum(
        parameter.nbytes
        for name, parameter in module.named_parameters()
        if parallel != "ep" or ".experts." not in name
    )


def describe(found: Plan) -> RenderableType:
    """A plan for people: what is held, what fits where, what a step and the whole training cost."""
    return Group(memory_table(found), fit_table(found), cost_table(found))


def memory_table(found: Plan) -> Table:
    who = "one process" if found.processes == 1 else f"each of {found.processes} processes ({found.parallel})"
    dtype = str(found.dtype).removeprefix("torch.")
    unit, scale = next((unit, scale) for unit, scale in BYTES.items() if found.total_bytes >= scale or scale == 1e3)
    table = Table("", unit, "", title=f"Memory of {who}, {found.batch_size} x {found.length:,} tokens, {dtype}")
    table.columns[1].justify = "right"
    idle = found.parameters - found.active_parameters
    count = millions(found.parameters) + (
        f", of which a token uses {millions(found.active_parameters)}" if idle else ""
    )
    of_these = (
        "all" if found.trained_parameters == found.parameters else f"{millions(found.trained_parameters)} that train"
    )
    recomputed = (
        "the layers' inputs, and one layer made anew" if found.gradient_checkpointing else "all that backward reads"
    )
    rows = {
        "parameters": (found.parameter_bytes, count),
        "gradients": (found.gradient_bytes, f"of {of_these}"),
        "optimizer": (found.optimizer_bytes, found.optimizer),
        "buffers": (found.buffer_bytes, ""),
        "traffic": (
            found.traffic_bytes,
            "gradients in buckets" if found.parallel == "ddp" else "weights while they are whole",
        ),
        "activations": (found.activation_bytes, recomputed),
        "loss": (found.loss_bytes, "a chunk of logits"),
    }
    for name, (size, note) in rows.items():
        if size:
            table.add_row(name, f"{size / scale:,.3f}", note)
    table.add_section()
    table.add_row(
        "together", f"{found.total_bytes / scale:,.3f}", "and what kernels and fragments take, about a tenth"
    )
    return table


def fit_table(found: Plan) -> Table:
    table = Table("", *(f"{size} GB" for size in DEVICES), title="What fits on a device")
    for column in table.columns[1:]:
        column.justify = "right"
    fits = [found.total_bytes <= size * 1e9 * USABLE for size in DEVICES]
    table.add_row("this step", *("yes" if fit else "no" for fit in fits))
    batches = [found.largest_batch(size) for size in DEVICES]
    table.add_row("largest batch", *(f"{batch:,}" if batch else "none" for batch in batches))
    return table


def cost_table(found: Plan) -> Table:
    table = Table("", "", title="Arithmetic")
    table.columns[1].justify = "right"
    table.add_row("tokens a step", f"{found.tokens_per_step:,}")
    table.add_row("FLOPs a step, all processes", units(found.step_flops))
    per_token = found.step_flops / found.tokens_per_step
    table.add_row("FLOPs a token", units(per_token))
    table.add_row("... as a multiple of active parameters", f"{per_token / found.active_parameters:.1f}")
    if found.steps is not None:
        table.add_row(f"steps for {found.tokens:,} tokens", f"{found.steps:,}")
    if found.gpu_days is not None:
        table.add_row(f"device days at {found.flops_per_second / 1e12:,.4g} TFLOPs a second", f"{found.gpu_days:,.2f}")
    return table


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
