"""Segments with a memory: every row of a batch reads on, and a stopped run goes on as if it had not been."""

import signal
from itertools import pairwise

import pytest
import torch
from tiny import build, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, TrainerCallback, TrainingArguments

from variform.training.segments import Segments, SegmentSampler, SegmentTrainer

LENGTH = 6
STREAM = torch.randint(3, 19, (6 * LENGTH * 2 + 2,), generator=torch.Generator().manual_seed(0))


def decoder(**fields):
    xl = {"position_embedding_type": "transformer_xl", "norm_type": "layer_norm", "memory_length": 9}
    return build(tiny("decoder", **{**xl, **fields}), AutoModelForCausalLM)


def trainer(folder, model=None, **options) -> SegmentTrainer:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    defaults |= {"per_device_eval_batch_size": 2, "num_train_epochs": 2, "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(str(folder), **{**defaults, **options})
    data = Segments(STREAM, LENGTH)
    return SegmentTrainer(model or decoder(), args, train_dataset=data, eval_dataset=data)


def test_segments_hold_every_token_once_as_a_label():
    data = Segments(STREAM, LENGTH)
    assert len(data) == 12
    assert_close(torch.cat([data[i]["labels"] for i in range(len(data))]), STREAM[1:73])
    assert_close(data[3]["input_ids"], STREAM[18:24])
    with pytest.raises(ValueError, match="`length=0` must be at least 1"):
        Segments(STREAM, 0)
    with pytest.raises(ValueError, match="The stream has 1 tokens"):
        Segments(STREAM[:1], 4)


@pytest.mark.parametrize(("count", "lanes"), [(12, 2), (13, 4), (7, 3), (5, 8), (1, 1)])
def test_each_row_of_a_batch_goes_on_where_it_stopped(count, lanes):
    order = list(SegmentSampler(count, lanes))
    assert sorted(order) == list(range(count))
    lanes = min(lanes, count)
    batches = [order[at : at + lanes] for at in range(0, count, lanes)]
    for before, after in pairwise(batches):
        assert [index + 1 for index in before[: len(after)]] == after


def test_a_step_reads_what_the_steps_before_left_in_memory(tmp_path):
    """The losses of Trainer's steps, at a learning rate of 0, are those of a plain loop that carries the memory."""
    model = decoder()
    run = trainer(tmp_path, model, learning_rate=0.0, num_train_epochs=1)
    run.train()
    found = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    halves, expected = STREAM[: 6 * LENGTH * 2 + 1], []
    memory, forgetful = DynamicCache(config=model.config), []
    for step in range(6):
        rows = [halves[start : start + LENGTH + 1] for start in (step * LENGTH, (6 + step) * LENGTH)]
        ids = torch.stack(rows)
        with torch.no_grad():
            targets = {"labels": ids[:, 1:], "shift_labels": ids[:, 1:]}
            expected.append(model(ids[:, :-1], **targets, past_key_values=memory, use_cache=True).loss.item())
            forgetful.append(model(ids[:, :-1], **targets, use_cache=False).loss.item())
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(expected[1:], forgetful[1:])) > 1e-2


def test_accumulated_segments_are_read_in_turn(tmp_path):
    run = trainer(tmp_path, learning_rate=0.0, num_train_epochs=1, gradient_accumulation_steps=3)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    single = trainer(tmp_path, learning_rate=0.0, num_train_epochs=1)
    single.train()
    each = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
    assert losses == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], abs=1e-4)


def test_evaluation_has_a_memory_of_its_own(tmp_path):
    run = trainer(tmp_path)
    run.memory = marker = DynamicCache(config=run.model.config)
    first = run.evaluate()["eval_loss"]
    assert run.memory is marker
    run.memory = None
    assert run.evaluate()["eval_loss"] == first
    # Of one row, with all of it in memory, the loss of the text in one
    single = trainer(tmp_path, decoder(memory_length=99), per_device_eval_batch_size=1)
    ids, targets = STREAM[None, :-2], STREAM[None, 1:-1]
    with torch.no_grad():
        whole = single.model.eval()(ids, labels=targets, shift_labels=targets, use_cache=False)
    assert single.evaluate()["eval_loss"] == pytest.approx(whole.loss.item(), abs=1e-3)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer(tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], parameter), name
    (tmp_path / "whole" / "checkpoint-4" / "memory_0.safetensors").unlink()
    cold = trainer(tmp_path / "cold", save_strategy="no")
    cold.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert not torch.equal(cold.model.lm_head.weight, whole.model.lm_head.weight)


def test_a_run_that_goes_on_at_the_edge_of_an_epoch_has_forgotten_the_one_before(tmp_path):
    """Trainer reads a checkpoint's memory back after the epoch has begun, and this one begins with none."""
    whole = trainer(tmp_path / "whole", save_strategy="epoch")
    assert whole.train_safely()
    assert not (tmp_path / "whole" / "checkpoint-6" / "memory_0.safetensors").exists()
    again = trainer(tmp_path / "again", save_strategy="no")
    assert again.train_safely(tmp_path / "whole" / "checkpoint-6")
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], parameter), name


def test_a_run_that_a_signal_stopped_goes_on_by_itself(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    whole = trainer(tmp_path / "whole", save_strategy="no")
    assert whole.train_safely()
    stopped = trainer(tmp_path / "run", save_strategy="no")
    stopped.add_callback(Stop())
    assert not stopped.train_safely() and stopped.state.global_step == 4
    again = trainer(tmp_path / "run", save_strategy="no")
    assert again.train_safely() and again.state.global_step == whole.state.global_step == 12
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], parameter), name
    lines = [[(e["step"], e["loss"]) for e in run.state.log_history if "loss" in e] for run in (whole, again)]
    assert lines[0] == lines[1]


def test_models_without_memory_and_data_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`memory_length=0`: the model remembers nothing"):
        trainer(tmp_path, decoder(memory_length=0))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`train_dataset` is a list; it must be `Segments`"):
        SegmentTrainer(decoder(), args, train_dataset=[1, 2])
