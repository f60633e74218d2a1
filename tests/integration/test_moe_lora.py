"""LoRA on experts: both layouts, every shape; routers stay as they are."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import build, inputs, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from variform.model import moe
from variform.training import lora_targets

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
LAYOUTS = ["fused", "modulelist"]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}


def make(shape: str, layout: str, **fields):
    """One dense layer and one of experts, with a shared one that is gated."""
    fields = {
        "num_experts": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "num_shared_experts": 1,
        "shared_expert_gate": True,
        "experts_layout": layout,
        **fields,
    }
    if shape == "encoder_decoder":
        return build(tiny(shape, encoder=fields, decoder=fields), HEADS[shape])
    return build(tiny(shape, **fields), HEADS[shape])


def batch() -> dict[str, torch.Tensor]:
    input_ids = inputs(batch=4)
    return {"input_ids": input_ids, "labels": input_ids.roll(1, dims=1)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**batch()).logits


def train(model, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = []
    model.train()
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_projections_and_fused_experts(layout):
    targets = lora_targets(make("decoder", layout))
    assert set(targets["target_modules"]) == ATTENTION | FEED_FORWARD
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert targets.get("target_parameters") == (experts if layout == "fused" else None)


def test_targets_of_plain_experts_with_biases():
    targets = lora_targets(make("encoder", "fused", gated_mlp=False, mlp_bias=True))
    assert targets["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.up_proj"]


def test_targets_of_a_dense_model_and_of_none():
    model = build(tiny("decoder", num_experts=0), AutoModelForCausalLM)
    assert lora_targets(model) == {"target_modules": sorted(ATTENTION | FEED_FORWARD)}
    with pytest.raises(ValueError, match="no layers of Variform"):
        lora_targets(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_has_every_projection_and_leaves_routers_alone(shape, layout):
    base = make(shape, layout)
    layers = [name for name, _ in base.named_modules() if name.endswith(("layers.0", "layers.1"))]
    model = get_peft_model(base, peft.LoraConfig(r=2, **lora_targets(base)))
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any(
        part in name for name in adapted for part in ("mlp.gate.", "shared_expert_gate", "lm_head", "embed")
    )
    for layer in layers:
        parts = ["self_attn.q_proj", "self_attn.o_proj"]
        if layer.endswith("0"):
            parts += ["mlp.gate_proj", "mlp.down_proj"]
        else:
            parts += ["mlp.shared_experts.up_proj"]
            parts += ["mlp.experts."] if layout == "fused" else [f"mlp.experts.{n}.down_proj" for n in range(4)]
        for part in parts:
            assert any(f"{layer}.{part}" in name for name in adapted), (layer, part)
    fused = [name for name, module in model.named_modules() if type(module).__name__ == "ParamWrapper"]
    sparse = sum(layer.endswith("1") for layer in layers)
    assert len(fused) == (2 * sparse if layout == "fused" else 0)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_adapter_is_saved_loaded_and_merged(shape, layout, tmp_path):
    base = make(shape, layout)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = logits(base)
    model = get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **lora_targets(base)))
    history = train(model)
    assert history[-1] < history[0]
    # Only the adapter has moved
    kept = {
        name.replace("base_model.model.", "", 1).replace("base_layer.", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    assert kept.keys() == before.keys()
    assert_close(kept, before, rtol=0, atol=0)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(shape, layout), tmp_path)
    assert_close(logits(loaded), adapted)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    experts = [name for name in before if "mlp.experts" in name]
    assert experts and all((merged.state_dict()[name] - before[name]).abs().max() > 0 for name in experts)
    assert all(torch.equal(merged.state_dict()[name], before[name]) for name in before if ".gate." in name)
    assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)


def test_own_kernel_computes_with_adapted_weights(monkeypatch):
    """The kernel for CPUs takes what PEFT makes of a parameter, and gives the gradients of the slow way."""
    calls, grads = [], []
    run_fused = moe.run_fused
    monkeypatch.setattr(moe, "run_fused", lambda *given: calls.append(1) or run_fused(*given))
    for implementation in ("grouped_mm", "eager"):
        base = make("decoder", "fused")
        torch.manual_seed(0)
        model = get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **lora_targets(base)))
        base.set_experts_implementation(implementation)
        model.train()
        model(**batch()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(calls) == 1  # one sparse layer, the first way
    assert any("experts" in name and grad.abs().max() > 0 for name, grad in grads[0].items())
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapter_trains_with_checkpointing(use_reentrant):
    grads = []
    for is_on in (False, True):
        base = make("decoder", "fused")
        torch.manual_seed(0)
        model = get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **lora_targets(base)))
        if is_on:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            base.enable_input_require_grads()
        model.train()
        model(**batch()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_close(grads[1], grads[0])


def test_dropout_on_fused_experts_is_refused_by_peft():
    base = make("decoder", "fused")
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        get_peft_model(base, peft.LoraConfig(lora_dropout=0.1, **lora_targets(base)))
    listed = make("decoder", "modulelist")
    get_peft_model(listed, peft.LoraConfig(lora_dropout=0.1, **lora_targets(listed)))
