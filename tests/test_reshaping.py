"""One call from any model to another form: what each operation preserves is said, and measured on a batch."""

import math
from typing import Any

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import variform
from variform import reshape

VOCAB_SIZE, LENGTH = 19, 11


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 16, "n_positions": 24}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, initializer_range=0.3, **sizes, **ids)).eval()


def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
    config = BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=24, initializer_range=0.3, **sizes)
    return BertForMaskedLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    config = T5Config(vocab_size=VOCAB_SIZE, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).eval()


def batch_for(model) -> dict[str, torch.Tensor]:
    ids, mask = pad(inputs(length=LENGTH), left=0, right=3)
    batch = {"input_ids": ids, "attention_mask": mask}
    if type(model) is T5ForConditionalGeneration:
        batch["labels"] = torch.nn.functional.pad(inputs(length=6, seed=1), (0, 2), value=-100)
    return batch


def stated(model, **changes: Any):
    return reshape(model, return_statement=True, **changes)


NATIVE = pytest.mark.parametrize("make", [gpt2, bert, t5])


@NATIVE
def test_a_native_model_in_another_form_computes_the_same_on_what_fits(make):
    native = make()
    batch = batch_for(native)
    result, statement = stated(
        native, batch=batch, attention_patterns=["full", f"sliding_window:{LENGTH}"], num_experts=8, granularity=2
    )
    assert [step.name for step in statement.steps] == ["from_hf", "sparsify", "upcycle"]
    assert all(step.difference < 1e-4 for step in statement.steps)
    stacks = [result.config.encoder, result.config.decoder] if make is t5 else [result.config]
    for stack in stacks:
        assert stack.num_experts == 8 and stack.attention_patterns[1]["name"] == "sliding_window"
    assert statement.original == type(native).__name__
    with torch.no_grad():
        assert_close(result(**batch)["logits"][:, :6], native(**batch).logits[:, :6], rtol=1e-4, atol=1e-4)


@NATIVE
def test_what_is_measured_is_what_one_measures_by_hand(make):
    native = make()
    batch = batch_for(native)
    result, statement = stated(native, batch=batch, attention_patterns=["sliding_window:2"], num_experts=4, noise=0.1)
    real = batch["labels"] != -100 if make is t5 else batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = [model(**batch).logits[real] for model in (native, result)]
    last = statement.steps[-1]
    assert statement.tokens == real.sum()
    assert math.isclose(last.difference, (outputs[1] - outputs[0]).abs().max().item(), rel_tol=1e-5)
    assert last.difference > 1e-2
    if make is bert:
        assert statement.loss is None and last.loss is None
        return
    labels = batch["labels"] if make is t5 else batch["input_ids"].masked_fill(~real, -100)
    with torch.no_grad():
        losses = [model(**{**batch, "labels": labels}).loss.item() for model in (native, result)]
    assert math.isclose(statement.loss, losses[0], rel_tol=1e-5) and math.isclose(last.loss, losses[1], rel_tol=1e-5)


def test_it_prints_what_it_preserves_unless_it_returns_it(capsys):
    native = gpt2()
    reshape(native, batch=batch_for(native), num_experts=4)
    said = capsys.readouterr().out
    for words in (
        "from_hf",
        "upcycle",
        "Equal to the original",
        "mean loss",
        "22 real tokens",
        "GPT2LMHeadModel itself",
    ):
        assert words in " ".join(said.split())
    _, statement = stated(native, num_experts=4)
    assert capsys.readouterr().out == ""
    assert "Nothing was measured: give a `batch`." in str(statement)


def test_without_changes_it_converts_and_of_ours_it_is_the_model():
    native = gpt2()
    model, statement = stated(native)
    assert type(model) is variform.VariformDecoderForCausalLM and len(statement.steps) == 1
    same, statement = stated(model, hidden_size=12)
    assert same is model and statement.steps == []


def test_the_original_stays_as_it_is():
    model = build(tiny("decoder"), AutoModelForCausalLM).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, _ = stated(model, batch=batch_for(model), num_experts=4, hidden_dropout=0.3)
    assert model.training and result.training and result.config.hidden_dropout == 0.3
    assert model.config.hidden_dropout == 0.0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_only_training_reads_is_set_where_it_belongs():
    model = build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM)
    model.config.origin = {"model_type": "t5"}
    result, statement = stated(model, hidden_dropout={"encoder": 0.2}, label_smoothing=0.1)
    assert (result.config.encoder.hidden_dropout, result.config.decoder.hidden_dropout) == (0.2, 0.0)
    assert (result.config.label_smoothing, result.config.origin) == (0.1, {"model_type": "t5"})
    assert "Equal to the original in evaluation; training reads hidden_dropout=" in str(statement.steps[0].statement)
    assert all(torch.equal(tensor, result.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_only_longer_keeps_the_patterns():
    model = build(tiny("decoder", attention_patterns=["sliding_window:5", "full"]), AutoModelForCausalLM)
    result, _ = stated(model, max_position_embeddings=48)
    assert result.config.attention_patterns == model.config.attention_patterns
    assert result.config.max_position_embeddings == 48


def test_experts_that_are_there_move_to_another_layout():
    model = build(tiny("decoder", num_experts=3), AutoModelForCausalLM)
    result, statement = stated(model, experts_layout="modulelist", router_z_loss_coef=0.1)
    assert [step.name for step in statement.steps] == ["change_experts_layout", "training"]
    assert (result.config.experts_layout, result.config.router_z_loss_coef) == ("modulelist", 0.1)


@pytest.mark.parametrize("make", [gpt2, None])
def test_a_folder_is_read_as_what_it_holds(make, tmp_path):
    model = gpt2() if make else build(tiny("decoder"), AutoModelForCausalLM)
    model.save_pretrained(tmp_path)
    batch = batch_for(model)
    for measured in (None, batch):
        result, statement = stated(tmp_path, batch=measured, num_experts=4)
        assert [step.name for step in statement.steps] == ["from_hf"] * bool(make) + ["upcycle"]
        with torch.no_grad():
            found, expected = (one(**batch).logits[:, :LENGTH] for one in (result, model))
        assert_close(found, expected, rtol=0, atol=1e-4)
    assert statement.steps[-1].difference < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "`hidden_size=16` would need other weights or give them another meaning"),
        ({"hidden_act": "relu"}, "`hidden_act='relu'` would need other weights"),
        ({"intermediate_size": 64}, "use `num_experts`, which widens"),
        ({"sliding_window": 4}, r"use `attention_patterns=\[\"sliding_window:512\"\]`"),
        ({"moe_intermediate_size": 8}, "use `num_experts` with `granularity`"),
        ({"vocab_size": 99}, "use `model.resize_token_embeddings`"),
        ({"num_expert": 4}, "Did you mean `num_experts`?"),
        ({"granularity": 2}, "`granularity=2` is of experts, and the model has none"),
        ({"router_jitter_noise": 0.1}, "the model has none: give `num_experts` as well"),
        ({"experts_layout": "fused"}, "`experts_layout='fused'` is of experts, and the model has none"),
        ({"max_position_embeddings": 7}, "`max_position_embeddings=7` is below the original's 24"),
        ({"num_experts": 3, "granularity": 2}, "`num_experts=3` is not a multiple of `granularity=2`"),
        ({"hidden_dropout": 2.0}, "`hidden_dropout=2.0` is a probability"),
    ],
)
def test_what_no_operation_makes_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        reshape(gpt2(), **changes)


def test_a_router_that_is_there_is_not_changed():
    model = build(tiny("decoder", num_experts=4), AutoModelForCausalLM)
    with pytest.raises(ValueError, match="`router_type='switch'` changes a router that is there"):
        reshape(model, router_type="switch")


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        reshape(torch.nn.Linear(2, 3), num_experts=4)
