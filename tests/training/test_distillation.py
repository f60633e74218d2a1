"""A student's losses are those of a loop, heed accumulation, and leave the teacher as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import build, tiny
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from variform.training.distillation import DistillationTrainer, likeness_loss, paired_layers, soft_loss, with_labels_of


def test_the_soft_loss_is_that_of_a_loop():
    torch.manual_seed(0)
    student, teacher, counts = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.rand(2, 5) < 0.5
    total = 0.0
    for row in range(2):
        for place in range(5):
            if counts[row, place]:
                p, q = (F.softmax(logits[row, place] / 3, dim=0) for logits in (teacher, student))
                total += 9 * sum(a * (a.log() - b.log()) for a, b in zip(p, q))
    torch.testing.assert_close(soft_loss(student, teacher, counts, 3.0), torch.as_tensor(total))


def test_likeness_is_that_of_a_loop_over_real_tokens_and_nought_for_equals_of_another_width():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 9)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    texts = []
    for row, length in enumerate((3, 4)):
        pairs = [(a, b) for a in range(length) for b in range(length)]
        cosine = [
            [F.cosine_similarity(states[row, a], states[row, b], dim=0) for a, b in pairs]
            for states in (student, teacher)
        ]
        texts.append(sum((x - y) ** 2 for x, y in zip(*cosine)) / len(pairs))
    torch.testing.assert_close(likeness_loss(student, teacher, mask), sum(texts) / 2)
    wider = torch.cat([2 * student, torch.zeros(2, 4, 3)], dim=-1)
    assert likeness_loss(student, wider, mask) < 1e-10


def test_the_last_layers_are_paired():
    assert paired_layers(2, 6) == [(1, 3), (2, 6)]
    assert paired_layers(4, 2) == [(1, 0), (2, 1), (3, 2), (4, 2)]


def trainer_of(tmp_path, auto_class, shape, *, rows=4, hidden=0.5, batch=4, **arguments):
    torch.manual_seed(0)
    student = build(tiny(shape, num_hidden_layers=1), auto_class)
    teacher = build(tiny(shape, num_hidden_layers=2, hidden_size=24), auto_class)
    lengths = [3, 7, 5, 6][:rows]
    ids = [torch.randint(3, 19, (length,)).tolist() for length in lengths]
    if auto_class is AutoModelForSequenceClassification:
        examples = [{"input_ids": row + [0] * (7 - len(row)), "labels": n % 2} for n, row in enumerate(ids)]
    else:
        examples = [{"input_ids": row + [0] * (7 - len(row)), "labels": row + [-100] * (7 - len(row))} for row in ids]
    for example, length in zip(examples, lengths):
        example["attention_mask"] = [1] * length + [0] * (7 - length)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return DistillationTrainer(
        model=student, teacher=teacher, soft=0.6, hidden=hidden, args=args, train_dataset=Dataset.from_list(examples)
    )


@pytest.mark.parametrize(
    ("auto_class", "shape"),
    [
        (AutoModelForCausalLM, "decoder"),
        (AutoModelForMaskedLM, "encoder"),
        (AutoModelForSequenceClassification, "encoder"),
        (AutoModelForSequenceClassification, "decoder"),
    ],
)
def test_one_batch_and_four_parts_of_it_take_the_same_step(tmp_path, auto_class, shape):
    whole = trainer_of(tmp_path / "a", auto_class, shape)
    parts = trainer_of(tmp_path / "b", auto_class, shape, batch=1, gradient_accumulation_steps=4)
    before = copy.deepcopy(whole.model.state_dict())
    taught = copy.deepcopy(whole.teacher.state_dict())
    for trainer in (whole, parts):
        trainer.train()
    moved = 0.0
    for (name, ours), theirs in zip(whole.model.state_dict().items(), parts.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)
        moved += (ours - before[name]).abs().sum()
    assert moved > 0
    assert all(torch.equal(weight, taught[name]) for name, weight in whole.teacher.state_dict().items())


def test_an_equal_student_has_nothing_to_learn(tmp_path):
    trainer = trainer_of(tmp_path, AutoModelForCausalLM, "decoder")
    trainer.soft, trainer.teacher = 1.0, copy.deepcopy(trainer.model).eval()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"soft": 1.5}, "`soft=1.5`"), ({"temperature": 0}, "`temperature=0`"), ({"hidden": -1.0}, "`hidden=-1.0`")],
)
def test_bad_weights_are_refused(tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        DistillationTrainer(teacher=build(tiny("decoder"), AutoModelForCausalLM), **given)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    student, teacher = (build(tiny("decoder", vocab_size=size), AutoModelForCausalLM) for size in (19, 21))
    with pytest.raises(ValueError, match="`teacher` predicts 21 classes, the student 19"):
        DistillationTrainer(model=student, teacher=teacher, args=args)


@pytest.mark.parametrize(
    ("theirs", "names", "numbers"),
    [
        ({0: "POS", 1: "NEG"}, ["POS", "NEG"], [1, 0, 1]),  # the teacher's order, whatever the case
        ({0: "LABEL_0", 1: "LABEL_1"}, ["neg", "pos"], [0, 1, 0]),  # names that say nothing
    ],
)
def test_classes_are_numbered_as_the_teachers(theirs, names, numbers):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features)
    config = SimpleNamespace(id2label=theirs, num_labels=2)
    data, fields = with_labels_of(config, DatasetDict({"train": rows, "validation": rows}))
    assert data["validation"]["label"][:] == numbers and list(fields["id2label"].values()) == names
    config = SimpleNamespace(id2label={0: "x"}, num_labels=1)
    with pytest.raises(ValueError, match=r"`label` has 2 classes \(neg, pos\), `teacher` predicts 1 classes \(x\)"):
        with_labels_of(config, DatasetDict({"train": rows}))
