"""finetune/answer.py: answers in texts that are longer than a window."""

import json

import pytest
from script_inputs import WORDS, form, write_lines
from transformers import AutoModelForQuestionAnswering

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Arguments with texts in which a number is to be found."""
    folder = tmp_path_factory.mktemp("answers")
    examples = []
    for n in range(24):
        context = " ".join(WORDS[(n + place) % 17] for place in range(14)) + f" {n} " + " ".join(WORDS)
        answers = {"text": [str(n)], "answer_start": [context.index(f" {n} ") + 1]}
        examples.append({"question": "which story?", "context": context, "answers": answers})
    train, held_out = (
        write_lines(folder / "train.jsonl", examples[:18]),
        write_lines(folder / "eval.jsonl", examples[18:]),
    )
    return ["--train_files", train, "--eval_files", held_out, "--max_length", "40", "--stride", "8"]


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_answers_are_found_and_judged(load_script, rows, tokenizers, tmp_path, shape, capsys):
    start = ["--form", form(shape), "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path)]
    assert load_script("answer").main([*rows, *STEPS, *start]) == 0
    assert "Exactly the answer" in capsys.readouterr().out
    measured = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= measured["exact_match"] <= measured["f1"] <= 100
    AutoModelForQuestionAnswering.from_pretrained(tmp_path)
