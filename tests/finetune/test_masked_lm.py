"""finetune/masked_lm.py: from a form, from checkpoints of both kinds, with adapters, and without training."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import WORDS, form
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Arguments with a file of lines to train on, and one to judge by."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [" ".join(WORDS[(3 * line + 5 * place) % 17] for place in range(9)) + f" {line}" for line in range(40)]
    (folder / "train.txt").write_text("\n".join(lines[:32]) + "\n", encoding="utf-8")
    (folder / "eval.txt").write_text("\n".join(lines[32:]) + "\n", encoding="utf-8")
    return ["--train_files", str(folder / "train.txt"), "--eval_files", str(folder / "eval.txt"), "--max_length", "32"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("masked_lm")


@pytest.fixture(scope="module")
def trained(script, texts, tokenizers, tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "masked"
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"]]
    assert script.main([*texts, *STEPS, *start, "--output_dir", str(folder)]) == 0
    return folder


def test_a_run_leaves_model_card_figures_log_and_curves(trained):
    measured = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert measured["steps"] == 2 and measured["perplexity"] > 1 and 0 <= measured["accuracy"] <= 100
    card = ModelCard.load(trained / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured["accuracy"], abs=0.01)
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (trained / "plots" / "curves.png").is_file() and (trained / "train_config.yaml").is_file()
    AutoModelForMaskedLM.from_pretrained(trained)


def test_packed_texts_are_masked_and_judged_alone(script, texts, trained, tokenizers, tmp_path, capsys):
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--rows", "pack"]
    assert script.main([*texts, *STEPS, *start, "--output_dir", str(tmp_path / "packed")]) == 0
    assert re.search(r"Packed: 32 documents in \d+ rows of 32 tokens", capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "packed" / "log.jsonl").read_text().splitlines()]
    seen = max(line.get("num_input_tokens_seen", 0) for line in lines)
    assert seen > 32 * 4 * 2 / 2  # eight rows that are nearly full, of twelve tokens a text
    with pytest.raises(ValueError, match="`rows: pack` keeps them apart"):
        script.main([*texts, *STEPS, *start, "--join_texts", "true", "--output_dir", str(tmp_path / "both")])


def test_the_same_command_only_judges_again(script, texts, trained, tokenizers, capsys):
    before = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"]]
    assert script.main([*texts, *STEPS, *start, "--output_dir", str(trained)]) == 0
    assert "holds a trained model" in capsys.readouterr().out
    assert json.loads((trained / "metrics.json").read_text(encoding="utf-8")) == before


def test_a_run_that_was_stopped_ends_as_one_in_one_piece(script, texts, tokenizers, tmp_path):
    start = ["--form", form("encoder", hidden_dropout=0.1), "--tokenizer", tokenizers["both"]]
    steps = [*texts, *STEPS, *start, "--save_steps", "3", "--lr_scheduler_type", "constant"]
    assert script.main([*steps, "--max_steps", "6", "--output_dir", str(tmp_path / "whole")]) == 0
    assert script.main([*steps, "--max_steps", "3", "--output_dir", str(tmp_path / "parts")]) == 0
    resume = ["--resume", str(tmp_path / "parts" / "checkpoint-3"), "--max_steps", "6"]
    assert script.main([*steps, *resume, "--output_dir", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_it_goes_on_from_ours_with_adapters_and_from_bert(script, texts, trained, tokenizers, tmp_path):
    more = ["--model", str(trained), "--use_peft", "true", "--lora_r", "2", "--output_dir", str(tmp_path / "lora")]
    assert script.main([*texts, *STEPS, *more]) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "bert")
    bert = ["--model", str(tmp_path / "bert"), "--tokenizer", tokenizers["both"]]
    assert script.main([*texts, *STEPS, *bert, "--output_dir", str(tmp_path / "more")]) == 0
    config = json.loads((tmp_path / "more" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "variform_encoder" and config["norm_placement"] == "post"


def test_a_dry_run_tells_and_writes_nothing(script, texts, tokenizers, tmp_path, capsys):
    start = ["--form", "bert-base", "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path / "run")]
    assert script.main([*texts, *start, "--dry_run", "true"]) == 0
    said = capsys.readouterr().out
    assert "this was a dry run" in said and "parameters" in said
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokenizer", "bytes", "--form", "{}"], "has no mask token"),
        (["--form", "bert-base"], "A new model needs a `tokenizer`"),
        (["--tokenizer", "{both}", "--form", "gpt2"], "`form` is a variform_decoder; this script trains"),
        (["--tokenizer", "{both}", "--form", "bert-base", "--max_length", "600"], "learned positions"),
        (["--tokenizer", "{both}", "--form", "bert-base", "--masked", "0"], "`masked=0.0` must be above 0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(script, texts, tokenizers, tmp_path, arguments, sentence):
    arguments = [word.format(**tokenizers) if word == "{both}" else word for word in arguments]
    with pytest.raises(ValueError, match=sentence):
        script.main([*texts, *STEPS, *arguments, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.glob("checkpoint-*"))
