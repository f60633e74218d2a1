"""A training step without numbers: the form's own code runs on tensors that have a shape and no memory, and is watched.

What backward will need is what autograd saves, and the arithmetic is what torch's counter would count; so every option of a
form is accounted for by the code that computes it, and by no formula that could forget one.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..model import block_attention, losses
from ..model.block_attention import Attended, Scoring, States, widen
from ..model.block_plan import BlockPlan, Group, Sorted
from ..model.expert_kernel import run_fused
from ..model.layers import TransformerLayer

aten = torch.ops.aten

# Up to this size masks and positions keep their numbers, because plans of sparse attention are made from them
MOST_NUMBERS = 2**22
# The experts of a CPU and those of an accelerator, whatever the device of the tensors that stand in for them
EXPERTS = {"cpu": "variform_dry_cpu", "cuda": "variform_dry_cuda"}
ALL_EXPERTS_FUNCTIONS.register(EXPERTS["cpu"], run_fused)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS["cuda"], lambda *args: grouped_mm_experts_forward(*args))


class DryStep(NamedTuple):
    """What one forward and one backward take."""

    kept_bytes: int  # that the forward keeps for the backward, parameters excluded; each storage once
    layer_bytes: int  # of them, in the layer that keeps most
    forward_flops: int
    backward_flops: int  # with what checkpointing computes anew


def run_dry_step(
    model: PreTrainedModel,
    batch_size: int,
    length: int,
    *,
    device: str = "cuda",
    gradient_checkpointing: bool = False,
    inputs: Callable[[], dict[str, Any]] | None = None,
) -> DryStep:
    """Runs a step of a model on the meta device, which it changes; takes about a second for 80 layers.

    Every token has a label, and no text has padding. Each expert gets as many tokens.

    Args:
        model: on the meta device, in training mode as it is to be run.
        batch_size, length: sequences, and tokens of each; an encoder-decoder's source is as long as its target.
        device: "cuda" or "cpu": whose kernels to take. Dropout keeps its mask in a byte a number on the one, and in the states'
            dtype on the other, where it keeps the attention weights too.
        gradient_checkpointing: whether layers keep their inputs alone and compute the rest anew.
        inputs: makes the arguments of the forward. Default: `input_ids` and `labels`.
    """
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        config._experts_implementation = EXPERTS[device]
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    replace_tensors(model, fake_mode)
    if gradient_checkpointing:
        # What is computed anew is computed by the same kernels
        contexts = lambda: (nullcontext(), Kernels(device))  # noqa: E731
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": contexts})
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}
    of_layers: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def size() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *call: of_layers.append(-size()))
        layer.register_forward_hook(lambda *call: of_layers.append(of_layers.pop() + size()))
    dry, kernels = Dry(fake_mode), Kernels(device)
    # The calls of a plan would be made one by one, and a head that stands in for a bare one be taken for wrapped
    blocks: dict[str, Any] = {"attend_by_plan": dry.attend_by_plan, "go_back_by_plan": dry.go_back_by_plan}
    replaced = ExitStack()
    replaced.enter_context(mock.patch.multiple(block_attention, **blocks))
    replaced.enter_context(mock.patch.object(losses, "_is_plain_linear", is_bare))
    with replaced, dry, kernels:
        given = make_inputs(model, batch_size, length) if inputs is None else inputs()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(
                **given, **({} if model.config.model_type == "variform_encoder" else {"use_cache": False})
            ).loss
        forward_flops = dry.flops
        torch.autograd.backward([loss])
    return DryStep(size(), max(of_layers), forward_flops, dry.flops - forward_flops)


def is_bare(module: torch.nn.Module) -> bool:
    """Whether a head is an `nn.Linear` and nothing more."""
    return type(module) is torch.nn.Linear


def make_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Ids and labels for a language-model head."""
    ids = torch.ones(batch_size, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def replace_tensors(model: PreTrainedModel, fake_mode: FakeTensorMode) -> None:
    """Puts tensors that say that they are on a CPU in place of those on the meta device; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                stand_in = FakeTensor(fake_mode, parameter.data, torch.device("cpu"))
                made[id(parameter)] = torch.nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake_mode, buffer, torch.device("cpu"))


class Dry(TorchDispatchMode):
    """Computes integers and truths that come from nothing but sizes, and of all else the shape; counts the operations."""

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode = fake_mode
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is aten.bincount.default and is_fake:
            # Which expert has how many tokens: as many as any other
            count = args[2] if len(args) > 2 else kwargs["minlength"]
            return torch.full((count,), args[0].numel() // count)
        if is_fake or not is_small(tensors, args):
            with self.fake_mode:
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops += FLOPS[packet](*args, **kwargs, out_val=output)
        return output

    def attend_by_plan(
        self, states: States, sinks: torch.Tensor | None, plan: BlockPlan, scoring: Scoring, seed: int
    ) -> Attended:
        """In place of the block kernel's forward: two products of each score of the plan."""
        query = states.query
        self.flops += 4 * scores_of(plan) * query.shape[-1]
        log_sum = torch.empty_like(query[..., :1], dtype=widen(query.dtype))
        return Attended(torch.empty_like(query), log_sum)

    def go_back_by_plan(self, grad, states: States, sinks, total, plan: BlockPlan, *others, learns_bias: bool):
        """In place of the block kernel's backward: two products for each of the forward's."""
        self.flops += 8 * scores_of(plan) * states.query.shape[-1]
        read = states if learns_bias else states._replace(bias=None)
        grads = States._make(None if part is None else torch.empty_like(part) for part in read)
        return grads, None if sinks is None else torch.empty_like(sinks)


def scores_of(plan: BlockPlan) -> int:
    """How many scores the calls of a plan compute, of all heads."""
    return sum(scores_of_group(group) for groups in plan.rounds for group in groups)


def scores_of_group(group: Group | Sorted) -> int:
    if isinstance(group, Sorted):
        # Its sequences stand in place of heads
        return sum(scores_of_group(own) for own in group.groups)
    heads = len(range(*group.heads.indices(group.heads.stop)))
    return heads * group.query.tiles * group.query.length * group.key.length


def is_small(tensors: list[torch.Tensor], args: Sequence[Any]) -> bool:
    """Whether an operation gives few numbers: on some tensors, or on none and a shape."""
    if tensors == [] and args and isinstance(args[0], (list, tuple)):
        return math.prod(args[0]) <= MOST_NUMBERS
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel() <= MOST_NUMBERS
    except RuntimeError:
        return all(tensor.numel() <= MOST_NUMBERS for tensor in tensors)


class Kernels(TorchFunctionMode):
    """Takes an accelerator's kernels where they keep something else than a CPU's."""

    def __init__(self, device: str):
        super().__init__()
        self.is_accelerator = device != "cpu"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self.is_accelerator and func is F.scaled_dot_product_attention:
            # The fused kernels drop weights, and learn a bias, without keeping the weights
            kwargs["dropout_p"] = 0.0
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = kwargs["attn_mask"].detach()
        if func is torch._grouped_mm:
            # Rows that are sorted by expert, times the weights of each
            return args[0] @ args[1][0]
        if self.is_accelerator and func is F.dropout:
            inputs, p, training = [*args, *list(kwargs.values())][:3]
            return torch.native_dropout(inputs, p, True)[0] if training else inputs
        return func(*args, **kwargs)


def attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    # As much again as the forward for each of the two products; what the kernel computes anew is not counted
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


# torch's counter has none for a CPU's fused attention, nor for products that are added in place, as the loss and experts have
FLOPS = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
