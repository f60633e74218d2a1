"""What LoRA adapts in a model with experts, in the words of `peft.LoraConfig`."""

from typing import Any

from torch import nn

from ..model.layers import TransformerLayer
from ..model.moe import Experts, MixtureOfExperts


def lora_targets(model: nn.Module) -> dict[str, Any]:
    """Names every projection of the layers: attention, dense feed-forward, shared and routed experts. Routers are left alone,
    and so are heads and embeddings.

        peft.LoraConfig(r=8, **lora_targets(model))

    Experts in the layout "modulelist" are `nn.Linear`s like the others. Those in the layout "fused" are parameters, which PEFT
    adapts by parametrization (`target_parameters`), a pair of factors an expert; for them it refuses a `lora_dropout` other
    than 0, `use_dora` and `lora_bias`.

    Returns:
        Keyword arguments: `target_modules` and, with fused experts, `target_parameters`.

    Raises:
        ValueError: for a model without Variform's layers.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        gates = {id(block.shared_expert_gate) for block in layer.modules() if isinstance(block, MixtureOfExperts)}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and id(module) not in gates:
                modules.add(name.rsplit(".", 1)[-1])
            elif isinstance(module, Experts):
                weights = [key for key, _ in module.named_parameters(recurse=False) if not key.endswith("_bias")]
                parameters |= {f"{name}.{key}" for key in weights}
    if not modules:
        raise ValueError(f"`model` has no layers of Variform: {type(model).__name__}.")
    targets: dict[str, Any] = {"target_modules": sorted(modules)}
    if parameters:
        targets["target_parameters"] = sorted(parameters)
    return targets
