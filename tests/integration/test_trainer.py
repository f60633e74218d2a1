"""Hugging Face's own Trainer and Seq2SeqTrainer train every shape, unchanged."""

import pytest
import torch
from tiny import VOCAB_SIZE, build, inputs, tiny
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

HEADS = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}


class Rows(Dataset):
    """Eight rows of seven tokens; as labels the same tokens, of which the first few of each row carry no weight."""

    def __init__(self, labels=None):
        self.input_ids = inputs(batch=8)
        if labels is None:
            hidden = torch.arange(7) < torch.tensor([0, 5, 2, 6, 1, 4, 3, 5])[:, None]
            labels = self.input_ids.masked_fill(hidden, -100)
        self.labels = labels

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def arguments(tmp_path, cls=TrainingArguments, **changes):
    """Plain gradient descent, so that equal gradients give equal weights, on the CPU and without reports."""
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return cls(tmp_path, **{**options, **changes}, **fixed)


def trained(model, tmp_path, data=None, **changes):
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=data or Rows())
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("shape", HEADS)
def test_loss_falls(shape, tmp_path):
    model = build(tiny(shape), HEADS[shape])
    trainer = trained(model, tmp_path, max_steps=30, optim="adamw_torch", learning_rate=1e-2)
    history = losses(trainer)
    assert sum(history[-4:]) < 0.7 * sum(history[:4])


CASES = [
    ("encoder", AutoModelForMaskedLM, None),
    ("decoder", AutoModelForCausalLM, None),
    ("encoder_decoder", AutoModelForSeq2SeqLM, None),
    (
        "encoder",
        AutoModelForTokenClassification,
        torch.tensor([[0, 1, -100, 1, 0, -100, 1]] * 4 + [[1] + [-100] * 6] * 4),
    ),
    ("decoder", AutoModelForSequenceClassification, torch.tensor([0, 1, 1, 0] * 2)),
    ("encoder", AutoModelForSequenceClassification, torch.rand(8, 2)),
]


@pytest.mark.parametrize("shape, auto_class, labels", CASES)
def test_four_accumulated_steps_of_one_row_equal_one_step_of_four(shape, auto_class, labels, tmp_path):
    data, steps = Rows(labels), []
    for batch, accumulated in ((4, 1), (1, 4)):
        model = build(tiny(shape, num_labels=2), auto_class)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer = trained(model, tmp_path, data, **options)
        steps.append((trainer.state.log_history[0]["loss"], model.state_dict()))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-4)
    for name, weight in steps[0][1].items():
        torch.testing.assert_close(weight, steps[1][1][name], msg=name)


def test_question_answering_accumulates(tmp_path):
    class Spans(Rows):
        def __getitem__(self, index):
            return {"input_ids": self.input_ids[index], "start_positions": index % 4, "end_positions": 5}

    weights = []
    for batch, accumulated in ((4, 1), (1, 4)):
        model = build(tiny("encoder"), AutoModelForQuestionAnswering)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trained(model, tmp_path, Spans(), **options)
        weights.append(model.qa_outputs.weight)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("shape", HEADS)
@torch.no_grad()
def test_label_smoothing_of_trainer_is_cross_entropy_with_smoothing(shape, tmp_path):
    """The causal model's labels are shifted first, the others' are not."""
    model, data = build(tiny(shape), HEADS[shape]), Rows()
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.2))
    batch = {"input_ids": data.input_ids, "labels": data.labels}
    if shape == "encoder_decoder":
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(data.labels)
    loss = trainer.compute_loss(model, dict(batch))
    logits, targets = model(**batch).logits, data.labels
    if shape == "decoder":
        logits, targets = logits[:, :-1], targets[:, 1:]
    expected = F.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", HEADS)
def test_evaluation_returns_loss_and_logits(shape, tmp_path):
    model, data = build(tiny(shape), HEADS[shape]), Rows()
    trainer = Trainer(
        model, arguments(tmp_path), eval_dataset=data, compute_metrics=lambda found: {"rows": len(found[0])}
    )
    output = trainer.predict(data)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    with torch.no_grad():
        expected = model(input_ids=data.input_ids, labels=data.labels)
    torch.testing.assert_close(torch.tensor(logits), expected.logits)
    assert output.metrics["test_rows"] == 8
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


def test_evaluation_between_training_steps_returns_logits(tmp_path):
    """Training leaves the logits out; an evaluation in its midst has them."""
    model, data, seen = build(tiny("decoder"), AutoModelForCausalLM), Rows(), []
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda found: seen.append(found.predictions.shape) or {},
    )
    trainer.train()
    assert seen == [(8, 7, VOCAB_SIZE)] * 2


@pytest.mark.parametrize("shape", HEADS)
def test_a_resumed_run_ends_where_the_whole_run_ends(shape, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = build(tiny(shape, **({} if shape == "encoder_decoder" else {"hidden_dropout": 0.1})), HEADS[shape])
    trained(whole, tmp_path, **options)
    resumed = HEADS[shape].from_pretrained(tmp_path / "checkpoint-2")
    trainer = Trainer(resumed, arguments(tmp_path, **options), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, msg=name)


def test_seq2seq_trainer_generates_for_its_metrics(tmp_path):
    model, data, seen = build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM), Rows(), []
    options = {"predict_with_generate": True, "generation_max_length": 5, "generation_num_beams": 2, "max_steps": 2}
    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, eval_strategy="steps", eval_steps=2, **options),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda found: seen.append(found.predictions) or {},
    )
    trainer.train()
    expected = model.eval().generate(data.input_ids, max_length=5, num_beams=2)
    found = torch.tensor(seen[0])[:, : expected.shape[1]]
    assert torch.equal(found.masked_fill(found == -100, 0), expected)


@pytest.mark.parametrize("shape", HEADS)
def test_gradient_checkpointing_changes_nothing(shape, tmp_path):
    weights = []
    for is_on in (False, True):
        model = build(tiny(shape), HEADS[shape])
        trained(model, tmp_path, gradient_checkpointing=is_on)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, msg=name)


def test_half_precision_training_follows_full_precision(tmp_path):
    history = []
    for is_half in (False, True):
        model = build(tiny("decoder"), AutoModelForCausalLM)
        history.append(losses(trained(model, tmp_path, max_steps=3, bf16=is_half)))
    assert history[0] == pytest.approx(history[1], rel=0.05)
