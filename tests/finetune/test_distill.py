"""finetune/distill.py: three tasks, a teacher that is judged and left as it is, and what a student must share with it."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import WORDS, form, write_lines
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

import variform

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1", "--learning_rate", "1e-2"]
HEADS = {
    "classify": ("encoder", AutoModelForSequenceClassification),
    "masked_lm": ("encoder", AutoModelForMaskedLM),
    "causal_lm": ("decoder", AutoModelForCausalLM),
}
FIGURES = {"classify": ["accuracy", "f1"], "masked_lm": ["accuracy", "perplexity"], "causal_lm": ["perplexity"]}
EXAMPLES = [
    {"text": f"{WORDS[n % 17]} the film was {('good', 'bad')[n % 2]} {n}", "label": ("pos", "neg")[n % 2]}
    for n in range(48)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    files = [write_lines(folder / "train.jsonl", EXAMPLES[:40]), write_lines(folder / "eval.jsonl", EXAMPLES[40:])]
    return ["--train_files", files[0], "--eval_files", files[1], "--max_length", "32", *STEPS]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("distill")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizers):
    """Folders of models that are wider and deeper than the students, with their tokenizers."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, (shape, auto_class) in HEADS.items():
        torch.manual_seed(1)
        fields = {"num_hidden_layers": 4, "hidden_size": 24, "initializer_range": 0.3, "pad_token_id": 0}
        # More ids than the tokenizer has tokens, as many models have; and classes in another order than the data's
        fields |= {"vocab_size": 336, "id2label": {0: "POS", 1: "NEG"}, "label2id": {"POS": 0, "NEG": 1}}
        variform.from_config({**json.loads(form(shape, **fields))}, auto_class=auto_class).save_pretrained(
            folder / task
        )
        AutoTokenizer.from_pretrained(tokenizers["start" if shape == "decoder" else "both"]).save_pretrained(
            folder / task
        )
    return folder


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def losses(folder) -> list[float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("task", HEADS)
def test_a_student_learns_beside_a_teacher_that_is_judged_and_not_changed(
    script, rows, teachers, tmp_path, task, capsys
):
    before = digests(teachers / task)
    taught = ["--task", task, "--teacher", str(teachers / task), "--hidden", "1", "--temperature", "3"]
    argv = [*rows, *taught, "--form", form(HEADS[task][0]), "--output_dir", str(tmp_path)]
    assert script.main(argv) == 0
    assert digests(teachers / task) == before
    measured = metrics(tmp_path)
    assert list(measured)[: len(FIGURES[task])] == FIGURES[task] and measured["steps"] == 2
    assert list(measured["baselines"]) == [f"teacher, {name}" for name in FIGURES[task]]
    assert measured["teacher_parameters"] > measured["parameters"]
    said = capsys.readouterr().out
    assert f"student, {FIGURES[task][0]}" in said and f"teacher, {FIGURES[task][0]}" in said
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured[FIGURES[task][0]], abs=0.01)
    HEADS[task][1].from_pretrained(tmp_path)
    assert script.main(argv) == 0  # only judges
    assert metrics(tmp_path) == measured


def test_the_teacher_is_judged_by_its_own_order_of_classes_which_becomes_the_students(
    script, rows, teachers, tmp_path
):
    taught = ["--teacher", str(teachers / "classify"), "--form", form("encoder"), "--output_dir", str(tmp_path)]
    assert script.main([*rows, *taught]) == 0
    teacher = AutoModelForSequenceClassification.from_pretrained(teachers / "classify").eval()
    tokenizer = AutoTokenizer.from_pretrained(teachers / "classify")
    right = 0
    for example in EXAMPLES[40:]:
        with torch.no_grad():
            answer = teacher(**tokenizer(example["text"], return_tensors="pt")).logits.argmax().item()
        right += teacher.config.id2label[answer].lower() == example["label"]
    assert metrics(tmp_path)["baselines"]["teacher, accuracy"] == pytest.approx(100 * right / 8)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert student.config.id2label == teacher.config.id2label == {0: "POS", 1: "NEG"}


@pytest.mark.parametrize("task", HEADS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(script, rows, teachers, tmp_path, task):
    same = ["--task", task, "--teacher", str(teachers / task), "--model", str(teachers / task)]
    still = ["--soft", "1", "--hidden", "1", "--learning_rate", "0", "--output_dir", str(tmp_path)]
    assert script.main([*rows, *same, *still]) == 0
    assert max(map(abs, losses(tmp_path))) < 1e-5
    measured = metrics(tmp_path)
    assert all(measured["baselines"][f"teacher, {name}"] == pytest.approx(measured[name]) for name in FIGURES[task])


def test_a_student_begins_as_layers_or_takes_adapters(script, rows, teachers, tmp_path):
    teacher = ["--teacher", str(teachers / "classify")]
    layers = ["--student_layers", "0", "3", "--learning_rate", "0", "--output_dir", str(tmp_path / "layers")]
    assert script.main([*rows, *teacher, *layers]) == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (teachers / "classify", tmp_path / "layers"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(ours[name.format(1)], theirs[name.format(3)])
    adapted = ["--model", str(tmp_path / "layers"), "--use_peft", "true", "--lora_r", "2"]
    assert script.main([*rows, *teacher, *adapted, "--output_dir", str(tmp_path / "lora")]) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert losses(tmp_path / "lora")[0] > 0


def test_a_run_that_was_stopped_ends_as_one_in_one_piece(script, rows, teachers, tmp_path):
    taught = [
        "--teacher",
        str(teachers / "masked_lm"),
        "--task",
        "masked_lm",
        "--form",
        form("encoder", hidden_dropout=0.1),
    ]
    steps = [*rows, *taught, "--hidden", "1", "--save_steps", "3", "--lr_scheduler_type", "constant"]
    assert script.main([*steps, "--max_steps", "6", "--output_dir", str(tmp_path / "whole")]) == 0
    assert script.main([*steps, "--max_steps", "3", "--output_dir", str(tmp_path / "parts")]) == 0
    resume = ["--resume", str(tmp_path / "parts" / "checkpoint-3"), "--max_steps", "6"]
    assert script.main([*steps, *resume, "--output_dir", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_a_dry_run_tells_and_writes_nothing(script, rows, teachers, tmp_path, capsys):
    taught = ["--teacher", str(teachers / "classify"), "--form", form("encoder"), "--dry_run", "true"]
    assert script.main([*rows, *taught, "--output_dir", str(tmp_path / "run")]) == 0
    assert "this was a dry run" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def headless(tmp_path_factory, tokenizers):
    """A checkpoint of BERT without a classifier."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizers["both"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--teacher", "{headless}"], "classifier"),
        (["--teacher", "{headless}/nowhere"], "There is no folder"),
        (["--teacher", "{teachers}/causal_lm", "--task", "masked_lm"], "`teacher` is a variform_decoder; this script"),
        (["--tokenizer", "bytes"], "reads other tokens than the tokenizer of this run"),
        (["--tokenizer", "{teachers}/classify", "--teacher", "{other}"], "reads other tokens than the tokenizer"),
        (
            ["--form", "gpt2", "--task", "masked_lm", "--teacher", "{teachers}/masked_lm"],
            "`form` is a variform_decoder",
        ),
        (["--soft", "1.5"], "`soft=1.5` must be from 0"),
        (["--temperature", "0"], "`temperature=0.0` must be above 0"),
        (["--student_layers", "0", "4"], "leave `form`, `model` and `use_peft` out"),
        (
            ["--train_files", "{three}", "--eval_files", "{held_out}"],
            "`label` has 3 classes (a, b, c), `teacher` predicts 2",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused(script, rows, teachers, headless, tmp_path, arguments, sentence):
    three, held_out = (
        write_lines(
            tmp_path / file, [{"text": f"{file} {name} {n}", "label": name} for n in range(3) for name in "abc"]
        )
        for file in ("three.jsonl", "held_out.jsonl")
    )
    other = tmp_path / "other"
    AutoModelForSequenceClassification.from_pretrained(teachers / "classify").save_pretrained(other)
    turned = AutoTokenizer.from_pretrained(teachers / "classify")
    turned.add_tokens(["play film"])
    turned.save_pretrained(other)
    places = {"teachers": teachers, "headless": headless, "three": three, "held_out": held_out, "other": other}
    start = ["--teacher", str(teachers / "classify"), "--form", form("encoder"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        script.main([*rows, *start, *(word.format(**places) for word in arguments)])
    assert sentence in str(refused.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
