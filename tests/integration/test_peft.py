"""PEFT adapts every shape: by name, without naming a target, and through the chunked loss."""

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel, get_peft_model
from peft.utils import constants
from tiny import build, inputs, pad, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from variform.model.configuration_variform import AUTO_MAP

HEADS = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
TASKS = {"encoder": None, "decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch() -> dict[str, torch.Tensor]:
    input_ids = inputs(batch=4)
    return {"input_ids": input_ids, "labels": input_ids.roll(1, dims=1)}


def train(model, steps: int = 10) -> list[float]:
    """The losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    history = []
    model.train()
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    model.eval()
    return history


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**batch()).logits


def adapted(shape: str, config) -> PeftModel:
    return get_peft_model(build(tiny(shape), HEADS[shape]), config)


@pytest.mark.parametrize("shape", HEADS)
def test_lora_without_targets_adapts_every_projection_of_the_layers(shape):
    model = adapted(shape, peft.LoraConfig())
    found = {name.split(".")[-1] for name, _ in model.named_modules() if hasattr(_, "lora_A") and "layers." in name}
    assert found == set(PROJECTIONS)
    assert not any("lora" in name and "layers." not in name for name, _ in model.named_parameters())
    history = train(model)
    assert history[-1] < history[0]


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(),
        peft.AdaLoraConfig(total_step=20),
        peft.LoHaConfig(),
        peft.LoKrConfig(),
        peft.OFTConfig(r=2, oft_block_size=0),
        peft.LNTuningConfig(),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_method_without_targets_trains(shape, config):
    model = adapted(shape, config)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and len(trainable) < len(list(model.named_parameters()))
    history = train(model)
    assert history[-1] < history[0]


@pytest.mark.parametrize("patterns", [["full"], ["sliding_window:4", "full"]])
def test_shadow_of_fewer_layers_trains(patterns):
    """It writes `layer_types` into a copy of the config: what follows from the other fields may be written, nothing else."""
    base = build(tiny("decoder", attention_patterns=patterns), HEADS["decoder"])
    model = get_peft_model(base, peft.ShadowConfig(task_type="CAUSAL_LM", r=2, shadow_num_hidden_layers=1))
    history = train(model)
    assert history[-1] < history[0]
    with pytest.raises(ValueError, match=r"`layer_types=.*` cannot be set"):
        base.config.layer_types = ["linear_attention"] * 2


def test_every_table_of_targets_knows_the_family():
    tables = [
        name for name in vars(constants) if name.startswith("TRANSFORMERS_MODELS_TO_") and "MODULES_MAPPING" in name
    ]
    assert len(tables) > 10
    for name in tables:
        assert set(AUTO_MAP) <= set(getattr(constants, name)), name


@pytest.mark.parametrize("shape", HEADS)
def test_all_linear_leaves_the_head_alone(shape):
    model = adapted(shape, peft.LoraConfig(target_modules="all-linear"))
    assert not any("lm_head" in name for name, _ in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_prompt_tuning_trains_and_generates(shape):
    model = adapted(shape, peft.PromptTuningConfig(task_type=TASKS[shape], num_virtual_tokens=3))
    history = train(model)
    assert history[-1] < history[0]
    input_ids, mask = pad(inputs(), left=2)
    assert model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=4).shape[0] == 2


@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_prefix_tuning_trains_and_generates(shape):
    model = adapted(shape, peft.PrefixTuningConfig(task_type=TASKS[shape], num_virtual_tokens=3))
    history = train(model)
    assert history[-1] < history[0]
    input_ids, mask = pad(inputs(), left=2)
    assert model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=4).shape[0] == 2


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("method", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_prompts_train_a_classifier(shape, method):
    base = build(tiny(shape, num_labels=3), AutoModelForSequenceClassification)
    model = get_peft_model(base, method(task_type="SEQ_CLS", num_virtual_tokens=3))
    given = {
        "input_ids": inputs(batch=4),
        "attention_mask": torch.ones(4, 7).long(),
        "labels": torch.tensor([0, 1, 2, 1]),
    }
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    history = []
    for _ in range(10):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0]
    assert all(p.grad is None for name, p in base.model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "shape, auto_class", [("decoder", AutoPeftModelForCausalLM), ("encoder_decoder", AutoPeftModelForSeq2SeqLM)]
)
def test_an_adapter_is_saved_and_loaded_with_its_base(shape, auto_class, tmp_path):
    build(tiny(shape), HEADS[shape]).save_pretrained(tmp_path / "base")
    base = HEADS[shape].from_pretrained(tmp_path / "base")
    model = get_peft_model(base, peft.LoraConfig(task_type=TASKS[shape]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto_class.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("shape", HEADS)
def test_a_merged_adapter_computes_the_same(shape):
    model = adapted(shape, peft.LoraConfig())
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_lora_on_the_head_has_the_gradients_of_the_full_logits(shape, is_tied):
    """The loss that never builds the logits takes the adapter's part of the head into account."""
    base = build(tiny(shape, tie_word_embeddings=is_tied, label_smoothing=0.1, z_loss_coef=0.01), HEADS[shape])
    model = get_peft_model(base, peft.LoraConfig(target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.train()
    results = []
    for skip_logits in (None, False):
        output = model(**batch(), skip_logits=skip_logits)
        assert (output.logits is None) == (skip_logits is None)
        output.loss.backward()
        grads = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        results.append((output.loss.detach(), grads))
        model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0])
    assert any("lm_head" in name for name in results[0][1])
    for name, grad in results[0][1].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, results[1][1][name], msg=name)


@pytest.mark.parametrize("shape", HEADS)
def test_new_tokens_are_saved_and_loaded(shape, tmp_path):
    """Resized embeddings keep the old rows, train under an adapter, and come back from disk with it."""
    model = build(tiny(shape), HEADS[shape])
    before = logits(model)
    model.resize_token_embeddings(23, mean_resizing=False)
    torch.testing.assert_close(logits(model)[..., :19], before)
    model.save_pretrained(tmp_path / "base")
    loaded = HEADS[shape].from_pretrained(tmp_path / "base").eval()
    assert loaded.config.vocab_size == 23
    torch.testing.assert_close(logits(loaded), logits(model))

    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[19, 20, 21, 22])
    wrapped = get_peft_model(loaded, config)
    given = torch.full((4, 7), 20)
    wrapped.train()
    wrapped(input_ids=given, labels=given).loss.backward()
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(HEADS[shape].from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(wrapped.eval()))
