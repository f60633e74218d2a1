"""Forms with experts under Trainer and in the scripts: accumulated steps add up, biases move, statistics are left behind."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import build, inputs, tiny
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROOT = Path(__file__).parents[2]
HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
LOSSES = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}
ROUTERS = {
    "softmax_topk": {},
    "switch": {"num_shared_experts": 1},
    "sigmoid_bias": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1},
    "modulelist": {"router_type": "softmax_topk", "experts_layout": "modulelist"},
}


def make(shape: str, name: str = "softmax_topk", **losses):
    fields = {"num_experts": 4, "router_type": name, **ROUTERS[name]}
    if shape == "encoder_decoder":
        return build(tiny(shape, encoder=fields, decoder=fields, **LOSSES | losses), HEADS[shape])
    return build(tiny(shape, **fields, **LOSSES | losses), HEADS[shape])


def rows() -> list[dict[str, torch.Tensor]]:
    """Four rows of which padding and labels without weight differ."""
    input_ids, places = inputs(batch=4), torch.arange(7)
    mask = (places < torch.tensor([7, 5, 6, 4])[:, None]).long()
    hidden = (mask == 0) | (places < torch.tensor([0, 3, 1, 2])[:, None])
    labels = input_ids.masked_fill(hidden, -100)
    input_ids = input_ids * mask
    return [
        {"input_ids": ids, "attention_mask": real, "labels": targets}
        for ids, real, targets in zip(input_ids, mask, labels)
    ]


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_step(model, folder, batch: int, use_reentrant: bool | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over the four rows."""
    checkpointing = {}
    if use_reentrant is not None:
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        }
    args = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    seen = Gradients()
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[seen])
    trainer.train()
    return trainer.state.log_history[0]["loss"], seen.found


CASES = [("encoder", "softmax_topk"), ("decoder", "softmax_topk"), ("encoder_decoder", "softmax_topk")]
CASES += [("encoder", "switch"), ("decoder", "sigmoid_bias"), ("encoder_decoder", "modulelist")]


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["whole", "checkpointed", "reentrant"])
@pytest.mark.parametrize("shape, name", CASES)
def test_four_accumulated_steps_of_one_row_equal_one_step_of_four(shape, name, use_reentrant, tmp_path):
    (loss, grads), (loss_of_rows, grads_of_rows) = (
        one_step(make(shape, name), tmp_path, batch, use_reentrant) for batch in (4, 1)
    )
    assert loss_of_rows == pytest.approx(loss, abs=1e-4)  # as Trainer rounds it
    assert_close(grads_of_rows, grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize("shape, name", CASES)
def test_checkpointing_changes_no_gradient(shape, name, use_reentrant, tmp_path):
    (loss, grads), (same_loss, same_grads) = (
        one_step(make(shape, name), tmp_path, 1, how) for how in (None, use_reentrant)
    )
    assert same_loss == pytest.approx(loss, abs=1e-4)
    assert_close(same_grads, grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", HEADS)
def test_router_losses_have_a_part_in_it(shape, tmp_path):
    """The tests above would say nothing if the losses were off."""
    (loss, grads), (less, other) = (
        one_step(
            make(shape, **{name: coefficient * factor for name, coefficient in LOSSES.items()}), tmp_path, 4, None
        )
        for factor in (1, 0)
    )
    assert loss > less + 0.1
    routers = [name for name in grads if name.endswith("mlp.gate.weight")]
    assert routers and all((grads[name] - other[name]).abs().max() > 1e-3 for name in routers)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "finetune" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_script_balances_and_watches_by_itself(tmp_path, capsys):
    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "long_text.yaml").read_text(encoding="utf-8"))
    recipe["form"] |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_experts": 4}
    recipe["form"] |= {"router_type": "sigmoid_bias", "mlp_layer_types": ["dense", "sparse"]}
    for name in ("train", "judged"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps\n" * 9, encoding="utf-8")
        recipe["eval_files" if name == "judged" else "train_files"] = [str(tmp_path / f"{name}.txt")]
    folder = tmp_path / "run"
    del recipe["dataset"]
    recipe |= {"max_length": 24, "max_steps": 4, "logging_steps": 2, "use_cpu": True, "output_dir": str(folder)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_script("causal_lm").main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    assert "expert_load.png" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["choices"] == {"model.layers.1": 2 * 24 * 2}  # steps, bytes, experts a byte
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert all("expert_entropy" in entry for entry in history if "loss" in entry)
    bias = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.any() and bias.abs().max() <= 4 * 0.001 + 1e-6
    assert (folder / "expert_load.png").is_file()
