"""A run stops before damage, and refuses to go on as another run."""

import json
import re
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments, set_seed

import variform
from variform.training import checkpoints, facts
from variform.training.budget import TimeBudget
from variform.training.checkpoints import is_trained, newest_committed
from variform.training.divergence import DivergedError, DivergenceWatch, diverged
from variform.training.safety import (
    CheckpointError,
    NonFiniteLossError,
    Safety,
)
from variform.training.trainers import SafeSeq2SeqTrainer, SafeTrainer

STACK = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def rows(count=12, length=6, seed=7):
    ids = torch.randint(3, 19, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    """To wait for the disk is slow, and only a power cut can tell."""
    monkeypatch.setattr(checkpoints, "_sync", lambda path: None)


@pytest.fixture
def make(tmp_path):
    """Makes a trainer of 6 steps, 3 an epoch, that saves every 2 into `run`."""

    def make_trainer(data=None, form=None, safety=None, trainer=SafeTrainer, **arguments):
        set_seed(0)
        fields = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            **arguments,
        }
        config = variform.VariformDecoderConfig(**{**STACK, "tie_word_embeddings": True, **(form or {})})
        return trainer(
            model=variform.from_config(config),
            args=TrainingArguments(**fields),
            train_dataset=rows() if data is None else data,
            safety=safety,
        )

    return make_trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(left, right):
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def spoil_loss(trainer, *steps, micro_batch=1):
    """The loss of a micro-batch is NaN at these steps."""
    compute, calls = trainer.compute_loss, []

    def spoiled(*args, **kwargs):
        loss = compute(*args, **kwargs)
        calls.append(0)
        number = len(calls) - 1
        return loss * float("nan") if (number // 2 + 1) in steps and number % 2 == micro_batch else loss

    trainer.compute_loss = spoiled


# ---- numbers that are none ----


def test_a_loss_that_is_not_finite_stops_before_the_update(make, tmp_path, capsys):
    trainer = make()
    spoil_loss(trainer, 4)
    before = {}
    step_of = trainer.training_step

    def remember(*args, **kwargs):
        before[trainer.state.global_step] = weights(trainer)
        return step_of(*args, **kwargs)

    trainer.training_step = remember
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train_safely()
    assert isinstance(caught.value, ArithmeticError)
    report = tmp_path / "run" / "not_finite_step_4_process_0.json"
    message = str(caught.value)
    assert message.startswith(f"Step 4: the loss of micro-batch 1 is not finite; its batch is in {report}")
    assert "The weights are those of step 3" in message and str(tmp_path / "run" / "checkpoint-2") in message
    assert_equal(weights(trainer), before[3])
    written = json.loads(report.read_text())
    assert written["step"] == 4 and written["losses"][1] == "nan" and written["losses"][0] != "nan"
    assert [len(batch["input_ids"]) for batch in written["micro_batches"]] == [2, 2]
    assert not is_trained(tmp_path / "run")


def test_a_gradient_that_is_not_finite_stops_too(make):
    trainer = make()
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match="Step 1: the gradient norm"):
        trainer.train_safely()
    assert_equal(weights(trainer), before)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_steps_are_left_out_as_long_as_they_are_few(make, capsys, max_grad_norm):
    """They change no weight, and leave no NaN in the log of the losses."""
    trainer = make(safety=Safety(max_skipped_steps=2), max_grad_norm=max_grad_norm, logging_steps=2)
    spoil_loss(trainer, 2, 3, 5)
    assert trainer.train_safely()
    assert trainer.skipped_steps == 3
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    assert capsys.readouterr().out.count("Left out") == 3


def test_a_step_left_out_leaves_the_weights(make):
    trainer = make(safety=Safety(max_skipped_steps=1), max_steps=1, weight_decay=0.1)
    spoil_loss(trainer, 1)
    before = weights(trainer)
    trainer.train_safely()
    assert_equal(weights(trainer), before)


def test_one_more_in_a_row_stops(make):
    trainer = make(safety=Safety(max_skipped_steps=2))
    spoil_loss(trainer, 2, 3, 4)
    with pytest.raises(NonFiniteLossError, match="Step 4"):
        trainer.train_safely()
    assert trainer.skipped_steps == 2


def test_an_endless_learning_rate_is_seen(make):
    """Trainer goes on to the end, logs a loss of 0.0, and saves weights that are all NaN."""
    with pytest.raises(NonFiniteLossError):
        make(learning_rate=1e30, lr_scheduler_type="constant").train_safely()


def test_losses_far_above_their_median_are_divergence_once():
    calm = [1.0] * 10
    assert not diverged(calm + [4.0] * 4)
    assert diverged(calm + [4.0] * 5)
    assert not diverged(calm + [4.0] * 6)  # said already
    assert not diverged([1.0] * 4 + [4.0] * 5)  # too early to tell
    assert not diverged(calm + [2.9] * 5)


def test_divergence_is_told_and_stops_where_that_is_asked_for():
    history = [{"loss": loss} for loss in [1.0] * 10 + [4.0] * 5]
    state, said = types.SimpleNamespace(log_history=history, global_step=15), []
    DivergenceWatch(False, said.append).on_log(None, state, None, logs=history[-1])
    assert said == ["Warning: The loss has been 3 times its median for 5 logs, at step 15: 4."]
    with pytest.raises(DivergedError, match="at step 15: 4"):
        DivergenceWatch(True, said.append).on_log(None, state, None, logs=history[-1])


# ---- what is refused before the first step ----


def test_labels_that_are_all_masked_are_refused(make):
    data = rows(70)
    for row in data:
        row["labels"][:] = -100
    with pytest.raises(ValueError, match=r"0\.0 % of the labels in `train_dataset` \(70 examples\) count"):
        make(data).train_safely()


def test_one_label_among_many_is_found(make):
    data = rows(200)
    for row in data:
        row["labels"][:] = -100
    data[1]["labels"][0] = 5  # not among those it looks at first
    assert facts.refuse_masked_labels(make(data)) == pytest.approx(1 / 1200)


def test_looking_at_the_data_draws_no_random_numbers(make):
    trainer = make()
    before, seed = torch.get_rng_state(), torch.initial_seed()
    facts.refuse_masked_labels(trainer)
    facts.run_facts(trainer)
    assert torch.equal(torch.get_rng_state(), before) and torch.initial_seed() == seed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"fp16": True}, "`fp16` needs an accelerator"), ({"fsdp": True}, "`fsdp` needs an accelerator")],
)
def test_what_a_cpu_would_ignore_is_refused(make, arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)


def test_processes_that_would_train_alone_are_refused(make, monkeypatch):
    trainer = make()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        facts.refuse_arguments(trainer.args)


def test_an_output_folder_that_is_a_file_is_refused(make, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=f"`output_dir` {tmp_path / 'run'} cannot be written"):
        make()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_skipped_steps": -1}, "max_skipped_steps"),
        ({"on_save_error": "no"}, "on_save_error"),
        ({"verify": "x"}, "verify"),
    ],
)
def test_a_bad_option_is_refused(fields, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Safety(**fields)


# ---- going on ----


@pytest.fixture
def stopped(make, tmp_path):
    """A run that was lost after step 4."""
    make(max_steps=4).train()
    return tmp_path / "run"


CHANGES = [
    ("per_device_train_batch_size", {"per_device_train_batch_size": 1}, "checkpoint 2, now 1"),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 1}, "checkpoint 2, now 1"),
    ("seed", {"seed": 43}, "checkpoint 42, now 43"),
    ("data_length", {"data": rows(13)}, "checkpoint 12, now 13"),
    ("data_fingerprint", {"data": rows(seed=8)}, "checkpoint"),
    ("optim", {"optim": "sgd"}, "checkpoint adamw_torch"),
    ("lr_scheduler_type", {"lr_scheduler_type": "cosine"}, "checkpoint linear, now cosine"),
    ("model_config.norm_eps", {"form": {"norm_eps": 1e-3}}, "checkpoint"),
    ("learning_rate", {"learning_rate": 0.02}, "checkpoint 0.01, now 0.02"),
    ("weight_decay", {"weight_decay": 0.5}, "checkpoint 0.0, now 0.5"),
    ("adam_beta1", {"adam_beta1": 0.5}, "checkpoint 0.9, now 0.5"),
    ("max_grad_norm", {"max_grad_norm": 0.5}, "checkpoint 1.0, now 0.5"),
    ("warmup_steps", {"warmup_steps": 2}, "checkpoint 0, now 2"),
]


@pytest.mark.parametrize(("field", "change", "words"), CHANGES)
def test_what_must_not_change_is_refused_by_field_with_both_values(stopped, make, field, change, words):
    with pytest.raises(ValueError) as caught:
        make(**change).train_safely()
    message = str(caught.value)
    assert f"{field}: checkpoint" in message and words in message
    allowed = re.search(r"`--allow_resume_changes (.*)`", message)[1].split()
    assert field.split(".")[0] in allowed


def test_a_change_may_be_allowed(stopped, make, capsys):
    trainer = make(seed=43)
    assert trainer.train_safely(allow_changes=["seed"]) and trainer.state.global_step == 6
    assert "Allowed: seed: checkpoint 42, now 43." in capsys.readouterr().out


def test_what_is_allowed_to_change_of_the_optimizer_does(stopped, make, capsys):
    trainer = make(learning_rate=0.04, weight_decay=0.5, adam_beta1=0.8)
    assert trainer.train_safely(allow_changes=["learning_rate", "weight_decay", "adam_beta1"])
    rates = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}
    # From 0.01 to 0 in 4 steps before; then the rest of a line from 0.04 to 0 in 6
    assert rates[4] == pytest.approx(0.01 / 4) and rates[6] == pytest.approx(0.04 / 6)
    groups = trainer.optimizer.param_groups
    assert {group["betas"][0] for group in groups} == {0.8} and {group["weight_decay"] for group in groups} == {
        0.0,
        0.5,
    }
    assert "Note: max_steps: checkpoint 4, now 6." in capsys.readouterr().out


def test_an_adapter_is_not_gone_on_with_as_a_model(stopped, make):
    trainer = make()
    trainer.model = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter\.type: checkpoint None, now LORA"):
        trainer.train_safely()


def test_a_run_is_no_checkpoint_to_go_on_from(stopped, make):
    with pytest.raises(ValueError, match="is the folder of a run: name one of checkpoint-2, checkpoint-4 in it"):
        make().train_safely(str(stopped))


def test_another_version_is_noted_only(stopped, make, capsys, monkeypatch):
    monkeypatch.setattr(facts.transformers, "__version__", "6.0")
    trainer = make()
    trainer._facts = facts.run_facts(trainer)
    assert trainer._choose_checkpoint(stopped, "auto", ()) == stopped / "checkpoint-4"
    assert "Note: transformers: checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_missing_file_means_the_checkpoint_before(stopped, make, capsys, name):
    (stopped / "checkpoint-4" / name).unlink()
    trainer = make()
    assert trainer.train_safely() and trainer.state.global_step == 6
    output = capsys.readouterr().out
    assert f"Passed over checkpoint-4: {name} is missing." in output and "Going on from" in output


def test_a_checkpoint_of_a_model_alone_is_refused(make):
    make(max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no rng_state\.pth: with `save_only_model`"):
        make().train_safely()


def test_a_named_checkpoint_that_is_not_whole_is_refused(stopped, make):
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2'` is not a checkpoint to go on from: optimizer\.pt is missing"
    ):
        make().train_safely(stopped / "checkpoint-2")


def test_going_back_sets_what_came_later_aside(stopped, make, capsys):
    trainer = make(max_steps=3)
    assert trainer.train_safely(stopped / "checkpoint-2") and trainer.state.global_step == 3
    assert newest_committed(stopped).checkpoint.name == "checkpoint-3"
    assert (stopped / "checkpoint-4.bak1").is_dir()


def test_none_starts_anew_and_a_model_of_before_no_longer_counts(make, tmp_path):
    assert make(max_steps=2).train_safely()
    trainer = make(max_steps=2)
    spoil_loss(trainer, 1)
    with pytest.raises(NonFiniteLossError):
        trainer.train_safely("none")
    assert not is_trained(tmp_path / "run")
    assert variform.VariformDecoderForCausalLM.from_pretrained(tmp_path / "run")


def test_steps_that_are_done_are_not_done_again(stopped, make, capsys):
    trainer = make(max_steps=3)
    assert trainer.train_safely()
    assert "checkpoint-4: already at 4 of 3 steps, nothing to do." in capsys.readouterr().out
    assert trainer.state.global_step == 4 and is_trained(stopped)


def test_a_trained_model_is_loaded_back(make, capsys):
    first, second = make(), make()
    assert first.train_safely() and second.train_safely()
    assert "holds a trained model: nothing to do" in capsys.readouterr().out
    assert_equal(weights(first), weights(second))
    assert second.state.global_step == 6


def test_a_checkpoint_of_another_model_is_never_loaded_in_part(stopped, make):
    trainer = make(form={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="weights are missing"):
        trainer.train_safely(allow_changes=["model_config"])


def test_rotation_waits_for_the_commit_and_keeps_two(make, tmp_path):
    trainer = make(save_total_limit=1, save_steps=1)
    trainer.train_safely()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert trainer.args.save_total_limit == 1


def test_only_committed_checkpoints_are_pushed(make, monkeypatch, tmp_path):
    trainer = make(max_steps=2)
    trainer.args.push_to_hub = True
    pushed = []

    def push(self, folder):
        pushed.append((folder, newest_committed(tmp_path / "run").checkpoint))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer.train()
    assert pushed == [(str(tmp_path / "run" / "checkpoint-2"), tmp_path / "run" / "checkpoint-2")]


def test_the_reason_of_a_save_that_failed_is_told(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: 1 / 0)
    with pytest.raises(CheckpointError, match=r"Could not write \S+checkpoint-2: division by zero"):
        trainer.train_safely()


def test_a_spent_budget_is_the_end_of_a_run(make, tmp_path):
    spent = {"global_step": 3, "stateful_callbacks": {"TimeBudget": {"args": {}, "attributes": {"used": 61.0}}}}
    trainer = SafeTrainer(model=make().model, args=make().args, train_dataset=rows(), budget=TimeBudget(1))
    assert trainer.reached(spent) == "1.0 of 1 min"
    spent["stateful_callbacks"]["TimeBudget"]["attributes"]["used"] = 59.0
    assert trainer.reached(spent) is None


def test_any_trainer_can_be_made_safe(make, tmp_path):
    fields = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path / "other"), **fields)
    trainer = SafeSeq2SeqTrainer(model=make().model, args=args, train_dataset=rows(), bucket_by=["labels"])
    assert trainer.train_safely() and is_trained(tmp_path / "other")


def test_the_fingerprint_sees_what_is_in_the_examples():
    same = facts.data_fingerprint([{"a": [1, 2], "b": "x"}])
    assert same == facts.data_fingerprint([{"b": "x", "a": [1, 2]}])
    for other in ({"a": [1, 3], "b": "x"}, {"a": [1, 2], "b": "y"}, {"a": [1], "b": "x"}, {"a": ["1", 2], "b": "x"}):
        assert facts.data_fingerprint([other]) != same
    assert facts.data_fingerprint(iter([])) is None


def test_examples_are_spread_over_the_data():
    assert facts.spread(3) == [0, 1, 2]
    indices = facts.spread(1000)
    assert len(set(indices)) == facts.EXAMPLES_READ and (indices[0], indices[-1]) == (0, 999)
