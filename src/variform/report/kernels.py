"""Which kernel computes each layer, as seen in a forward, and why none that is faster."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.utils import is_flash_attn_2_available

from ..model.attention import SPELLED_OUT, Attention
from ..model.block_plan import BlockPlan
from ..model.expert_kernel import can_fuse
from ..model.lsh import HashedTexts
from ..model.masks import SHORTEST_FOR_BLOCKS
from ..model.moe import ExpertList, MixtureOfExperts, is_quantized
from ..model.pattern_base import Full
from ..model.pretrained import backend_obstacle
from ..model.stacks import TransformerStack
from .views import spans


class Kernel(NamedTuple):
    """What computes some layers' attention or experts."""

    where: str  # "encoder layers 0-3: sliding_window:64"
    name: str
    why: str  # why no faster one; "" where there is none


@torch.no_grad()
def kernels_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[Kernel]:
    """What computes the layers of a model, watched in one forward in evaluation mode.

    Args:
        model: any model of the family. inputs: arguments of its forward, without padding to see what full texts take.
    """
    seen: dict[
        tuple[int, int, bool], Any
    ] = {}  # stack, layer and whether to another stack: the mask, and states' length
    stacks = [stack for stack in model.modules() if isinstance(stack, TransformerStack)]

    def watch(number: int, is_cross: bool):
        def note(module: Attention, arguments: tuple, options: dict[str, Any]) -> None:
            layer_idx = options.get("layer_idx")
            layer_idx = module.layer_idx if layer_idx is None else layer_idx
            length = (arguments[0] if arguments else options["hidden_states"]).shape[1]
            seen[number, layer_idx, is_cross] = options.get("attention_mask"), length

        return note

    handles = []
    for number, stack in enumerate(stacks):
        for layer in stack.layers:
            handles.append(layer.self_attn.register_forward_pre_hook(watch(number, False), with_kwargs=True))
            if layer.cross_attn is not None:
                handles.append(layer.cross_attn.register_forward_pre_hook(watch(number, True), with_kwargs=True))
    was_training = model.training
    try:
        model.eval()(**inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = []
    for number, stack in enumerate(stacks):
        found += list(attention_kernels(stack, {key[1:]: value for key, value in seen.items() if key[0] == number}))
        found += list(expert_kernels(stack))
    return found


def attention_kernels(stack: Any, seen: dict[tuple[int, bool], Any]) -> Iterator[Kernel]:
    """Of a stack's layers, those that are alike together."""
    config, alike = stack.config, defaultdict(list)
    for (layer_idx, is_cross), (mask, length) in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0])):
        pattern = None if is_cross else config.pattern_of(layer_idx)
        words = "cross-attention" if is_cross else str(pattern)
        kernel = (words, *judge(config, pattern, mask, length))
        alike[kernel].append(layer_idx)
    for (words, name, why), layers in alike.items():
        yield Kernel(f"{side_of(config)} {spans('layer', layers)}: {words}", name, why)


def side_of(config: Any) -> str:
    return config.model_type.removeprefix("variform_")


def judge(config: Any, pattern: Any, mask: Any, length: int) -> tuple[str, str]:
    """The kernel of one layer, by the mask that it was given, and why no faster one.

    Args:
        config: the stack's. pattern: what the layer's queries see; None for cross-attention. length: of the text, in tokens.
    """
    backend = config._attn_implementation
    if isinstance(mask, BlockPlan):
        return "block kernel, at the cost of the pattern", ""
    if isinstance(mask, HashedTexts):
        return "chunks sorted by hash", ""
    if backend == "eager":
        return "eager, every weight spelled out", "`attn_implementation='eager'` was asked for: leave it out"
    if backend.startswith("flash"):
        return (
            f"{backend}, {'its window' if pattern is not None and pattern.name == 'sliding_window' else 'whole'}",
            "",
        )
    if backend == "flex_attention":
        return "flex_attention, blocks of a mask", ""
    masked = "without a mask" if mask is None else "with a dense mask"
    name = f"spelled out, {masked}" if backend == SPELLED_OUT else f"{backend}, {masked}"
    reasons = [f"sdpa cannot express `{backend_obstacle(config, 'sdpa')}`"] if backend == SPELLED_OUT else []
    if mask is not None:
        reasons.append(why_masked(config, pattern, length))
    elif pattern is not None and type(pattern) is not Full and length <= pattern.longest_whole(config.is_causal_stack):
        reasons.append(f"the pattern hides nothing of {length} tokens")
    return name, "; ".join(reasons)


def why_masked(config: Any, pattern: Any, length: int) -> str:
    """Why a mask over all pairs, and no plan of the pattern's tiles: the rules of `masks.lower_to_plan`, in its order."""
    if config.position_embedding_type == "transformer_xl":
        return "`position_embedding_type='transformer_xl'` scores each pair by its distance and its query"
    has_bias = config.position_embedding_type in ("relative_bias", "alibi")
    if pattern is None or type(pattern) is Full or length <= pattern.longest_whole(config.is_causal_stack):
        if has_bias and pattern is not None:
            return f"`position_embedding_type={config.position_embedding_type!r}` adds to the score of each pair"
        return "the batch has padding"
    if length < SHORTEST_FOR_BLOCKS:
        return f"a plan of tiles pays from {SHORTEST_FOR_BLOCKS} tokens on, these are {length}"
    return f"of {length} tokens the pattern shows too much for a plan of tiles to pay"


def expert_kernels(stack: Any) -> Iterator[Kernel]:
    """What computes the experts of a stack."""
    alike = defaultdict(list)
    for number, layer in enumerate(stack.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            alike[judge_experts(layer.mlp.experts)].append(number)
    for (name, why), layers in alike.items():
        yield Kernel(f"{side_of(stack.config)} {spans('layer', layers)}: experts", name, why)


def judge_experts(experts: Any) -> tuple[str, str]:
    """The kernel of a layer's experts by the rules of `Experts.forward`, and why no faster one."""
    if isinstance(experts, ExpertList):
        return "one expert after the other", "`experts_layout='modulelist'` keeps each as modules: 'fused' is faster"
    backend = experts.config._experts_implementation
    run = ALL_EXPERTS_FUNCTIONS.get_interface(backend, type(experts).run_eagerly)
    if run is grouped_mm_experts_forward and can_fuse(experts, experts.down_proj):
        return "the CPU's own kernel, rows gathered expert by expert", ""
    if is_quantized(experts.down_proj):
        return "one expert after the other", "torchao's weights are multiplied one matrix at a time"
    if run is type(experts).run_eagerly:
        return "one expert after the other", "`experts_implementation='eager'` was asked for: leave it out"
    is_default = backend == "grouped_mm"
    return str(backend), "" if is_default else f"`experts_implementation={backend!r}` was asked for: leave it out"


def why_not_flash(config: Any, device: torch.device) -> str:
    """Why FlashAttention does not compute a stack, or that it could."""
    if str(config._attn_implementation).startswith("flash"):
        return ""
    obstacle = backend_obstacle(config, "flash_attention_2")
    if obstacle is not None:
        return f"FlashAttention cannot express `{obstacle}`"
    if device.type != "cuda":
        return f"FlashAttention needs a GPU, and this is the {device.type.upper()}"
    if not is_flash_attn_2_available():
        return "FlashAttention is not installed: `pip install flash-attn`"
    return "FlashAttention can: pass `attn_implementation='flash_attention_2'` with a dtype of 16 bits"
