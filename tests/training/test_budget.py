"""The schedule follows the clock, and the clock survives an interruption."""

import json
import math

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerControl,
    TrainerState,
)

from variform.training import budget as module
from variform.training.budget import TimeBudget, agree
from variform.training.tokenizer import letters_and_symbols_tokenizer
from variform.training.trainers import SafeSeq2SeqTrainer


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that a step moves on by 6 seconds, so that 10 steps are a minute."""

    class Clock:
        now = 1000.0

        def __call__(self):
            self.now += 6.0
            return self.now

    wall = Clock()
    monkeypatch.setitem(module.CLOCKS, "wall", wall)
    return wall


@pytest.fixture
def make_trainer(tmp_path):
    tokenizer = letters_and_symbols_tokenizer("abc", ["A", "B", "C"])
    pairs = [("abc"[i % 3] * (1 + i % 4), "ABC"[i % 3]) for i in range(40)]
    examples = [
        {"input_ids": tokenizer(source)["input_ids"], "labels": tokenizer(target)["input_ids"]}
        for source, target in pairs
    ]

    def make(budget, **arguments):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        arguments = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "learning_rate": 0.1,
            "num_train_epochs": 100,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **arguments,
        }
        return SafeSeq2SeqTrainer(
            model=T5ForConditionalGeneration(config),
            args=Seq2SeqTrainingArguments(**arguments),
            train_dataset=examples,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            budget=budget,
            bucket_by=("input_ids", "labels"),
        )

    return make


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"minutes": 0}, "minutes"),
        ({"minutes": 1, "warmup_ratio": 1}, "warmup_ratio"),
        ({"minutes": 1, "clock": "sun"}, "clock"),
    ],
)
def test_a_bad_budget_is_refused(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        TimeBudget(**arguments)


def test_the_learning_rate_rises_and_falls_with_time():
    budget = TimeBudget(10, warmup_ratio=0.1)
    factors = []
    for minutes in (0, 0.5, 1, 5.5, 10, 11):
        budget.used = 60 * minutes
        factors.append(budget.learning_rate_factor())
    assert factors == pytest.approx([0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 2)), 0, 0])


def test_without_warmup_the_first_rate_is_the_highest():
    assert TimeBudget(1, warmup_ratio=0).learning_rate_factor() == 1.0


def test_training_stops_when_the_time_is_spent(clock, make_trainer):
    budget = TimeBudget(1)
    trainer = make_trainer(budget)
    trainer.train()
    assert trainer.state.global_step == 10
    assert budget.used == pytest.approx(60)


def test_the_optimizer_gets_the_rate_of_the_clock(clock, make_trainer):
    budget = TimeBudget(1, warmup_ratio=0)
    trainer = make_trainer(budget)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    # The rate of a step is known when the step before it ended
    elapsed = [0, 0, *range(6, 54, 6)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * seconds / 60)) for seconds in elapsed], abs=1e-6)


def test_a_resumed_run_has_the_rest_of_its_time(clock, make_trainer, tmp_path):
    first = make_trainer(TimeBudget(1), save_strategy="steps", save_steps=4, max_steps=4)
    first.train()
    clock.now += 10_000  # the machine was off
    budget = TimeBudget(1)
    second = make_trainer(budget)
    assert second.train_safely()
    assert second.state.global_step == 10
    assert budget.used == pytest.approx(60)


def test_a_run_whose_time_is_spent_is_not_trained_further(clock, make_trainer, tmp_path, capsys):
    make_trainer(TimeBudget(1)).train()
    again = make_trainer(TimeBudget(1))
    assert again.train_safely() and again.state.global_step == 10
    assert "checkpoint-10: already at 1.0 of 1 min, nothing to do." in capsys.readouterr().out


def test_a_resumed_run_knows_from_the_start_how_much_is_used():
    budget = TimeBudget(1)
    state = TrainerState(
        stateful_callbacks={"TimeBudget": {"args": {}, "attributes": {"used": 45.0, "core_seconds": 9.0}}}
    )
    budget.on_train_begin(None, state, TrainerControl())
    assert (budget.progress, budget.core_seconds) == (0.75, 9.0)


def test_the_time_used_is_in_the_checkpoint(clock, make_trainer, tmp_path):
    make_trainer(TimeBudget(1)).train()
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["stateful_callbacks"]["TimeBudget"]["attributes"]["used"] == pytest.approx(60)


def test_resuming_in_the_middle_of_an_epoch_gives_the_weights_of_a_run_in_one_piece(make_trainer, tmp_path):
    whole = make_trainer(None, max_steps=14)
    whole.train()
    make_trainer(None, max_steps=14, save_strategy="steps", save_steps=13).train()
    resumed = make_trainer(None, max_steps=14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0, msg=name)


def test_without_a_budget_the_schedule_is_the_one_of_the_arguments(make_trainer):
    trainer = make_trainer(None, max_steps=2, lr_scheduler_type="constant")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [0.1, 0.1]


def test_one_process_agrees_with_itself():
    assert agree(1.5, torch.device("cpu")) == 1.5
