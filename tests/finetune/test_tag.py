"""finetune/tag.py: tags of words, judged by words or by spans."""

import json

import pytest
from script_inputs import WORDS, form, write_lines
from transformers import AutoModelForTokenClassification

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Arguments with sentences whose capitalised words are names."""
    folder = tmp_path_factory.mktemp("tags")
    examples = []
    for n in range(40):
        words = [WORDS[(n + 3 * place) % 17] for place in range(6)]
        words[n % 6] = words[n % 6].upper()
        examples.append({"tokens": words, "tags": ["B-PER" if word.isupper() else "O" for word in words]})
    train, held_out = (
        write_lines(folder / "train.jsonl", examples[:32]),
        write_lines(folder / "eval.jsonl", examples[32:]),
    )
    return ["--train_files", train, "--eval_files", held_out, "--max_length", "48"]


@pytest.mark.parametrize(("metric", "first"), [("accuracy", "accuracy"), ("seqeval", "f1")])
def test_words_are_tagged_and_judged(load_script, rows, tokenizers, tmp_path, metric, first, capsys):
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path)]
    assert load_script("tag").main([*rows, *STEPS, *start, "--metric", metric]) == 0
    assert f"{first} on held-out words" in capsys.readouterr().out
    measured = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= measured[first] <= 100
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.label2id == {"B-PER": 0, "O": 1}
