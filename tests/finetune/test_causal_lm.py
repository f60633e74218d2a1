"""finetune/causal_lm.py: what rows hold, what is measured, where a run starts from and goes on, and what is refused."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import ROOT, WORDS, form
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from variform.report.costs import count_costs
from variform.training.data.windows import IGNORED

LENGTH = 24
STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Arguments with files that are a text each."""
    folder = tmp_path_factory.mktemp("texts")
    for name, start, times in (("a", 0, 30), ("b", 7, 17), ("judged", 3, 20)):
        words = [WORDS[(start + 5 * place) % len(WORDS)] for place in range(times)]
        (folder / f"{name}.txt").write_text(" ".join(words) + " \u00e9t\u00e9\n", encoding="utf-8")
    files = ["--train_files", str(folder / "[ab].txt"), "--eval_files", str(folder / "judged.txt")]
    return [*files, "--max_length", str(LENGTH)]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("causal_lm")


@pytest.fixture(scope="module")
def start():
    return ["--form", form("decoder"), "--tokenizer", "bytes"]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def held_out(texts: list[str]) -> str:
    return Path(texts[3]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(script, texts, start, tmp_path_factory):
    """A run of two steps, and what it said."""
    folder = tmp_path_factory.mktemp("run") / "writer"
    assert script.main([*texts, *STEPS, *start, "--output_dir", str(folder)]) == 0
    return folder


def test_a_run_is_judged_described_and_only_judged_again(script, texts, start, trained, capsys):
    measured = metrics(trained)
    assert measured["steps"] == 2 and measured["flops_per_token"] > 0 and measured["smallest_context"] == LENGTH // 2
    assert list(measured["baselines"]) == ["gzip -9", "xz -9e", "xz -9e, trained"]
    card = ModelCard.load(trained / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured["bits_per_byte"], abs=0.01)
    assert f"{measured['bits_per_byte']:.3f} bits per byte" in card.text
    assert script.main([*texts, *STEPS, *start, "--output_dir", str(trained)]) == 0
    assert "holds a trained model" in capsys.readouterr().out
    assert metrics(trained) == measured


@pytest.mark.parametrize("tokenizer", ["bytes", "start", "both"])
def test_bits_per_byte_are_those_of_one_token_after_the_other(script, texts, tokenizers, tmp_path, tokenizer):
    named = ["--form", form("decoder"), "--tokenizer", tokenizers.get(tokenizer, tokenizer), "--eval_stride", "5"]
    assert script.main([*texts, *STEPS, *named, "--output_dir", str(tmp_path)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path)(held_out(texts))["input_ids"]
    tokens = tokens[:-1] if tokenizer == "both" else tokens  # the end is no part of the text
    nats, begin, reached = 0.0, 0, min(LENGTH, len(tokens))
    for place in range(1, len(tokens)):
        if place == reached:  # the next window
            reached = min(reached + 5, len(tokens))
            begin = reached - LENGTH
        with torch.no_grad():
            logits = model(torch.tensor([tokens[begin:place]])).logits[0, -1]
        nats += F.cross_entropy(logits, torch.tensor(tokens[place])).item()
    assert len(tokens) > LENGTH
    expected = nats / math.log(2) / len(held_out(texts).encode())
    assert metrics(tmp_path)["bits_per_byte"] == pytest.approx(expected, abs=1e-5)


class Rows:
    """What `make_rows` needs of a run."""

    class training:
        seed = 0

    @staticmethod
    def say(*args):
        pass


def batch_of(script, rows: str, documents: list[str], tokenizer: str, config) -> dict:
    """All rows as one batch."""
    from datasets import Dataset, DatasetDict

    data = DatasetDict({"train": Dataset.from_dict({"text": documents})})
    task = script.TextArguments(max_length=32, rows=rows)
    dataset, collator = script.make_rows(task, data, AutoTokenizer.from_pretrained(tokenizer), config, Rows)
    return collator([dataset[number] for number in range(len(dataset))])


def test_rows_hold_what_they_say(script, tokenizers):
    """Joined texts are one stream of which each token is predicted once; packed and padded ones give equal losses."""
    torch.manual_seed(0)
    import variform

    model = variform.from_config({**json.loads(form("decoder")), "vocab_size": 320}).eval()
    documents = ["the film was dull", "a bright story and good acting", "the end"]
    read = AutoTokenizer.from_pretrained(tokenizers["start"])
    lengths = [len(read(text)["input_ids"]) + 1 for text in documents]  # and the end of each

    joined = batch_of(script, "join", documents, tokenizers["start"], model.config)
    stream = [token for text in documents for token in [*read(text)["input_ids"], read.eos_token_id]]
    assert joined["labels"][:, 1:].ne(IGNORED).sum() == len(stream) - 1
    assert joined["input_ids"][0].tolist() == stream[: len(joined["input_ids"][0])]

    packed, padded = (batch_of(script, rows, documents, tokenizers["start"], model.config) for rows in ("pack", "pad"))
    assert len(packed["input_ids"]) == 1 and len(padded["input_ids"]) == 3
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in (packed, padded)]
        alone = sum(
            model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            for ids in (
                row[:length][None] for row, length in zip(padded["input_ids"], padded["attention_mask"].sum(1))
            )
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[1] == pytest.approx(alone / (sum(lengths) - 3), abs=1e-5)

    # Another document in the row changes nothing of this one
    begin = packed["position_ids"][0].tolist().index(0, 1)
    other = {**packed, "input_ids": packed["input_ids"].clone()}
    other["input_ids"][0, :begin] = 7
    with torch.no_grad():
        before, after = (model(**batch).logits[0, begin : sum(lengths)] for batch in (packed, other))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", ["pack", "pad"])
def test_whole_texts_are_trained_on(script, texts, tokenizers, tmp_path, rows, capsys):
    named = ["--form", form("decoder"), "--tokenizer", tokenizers["start"], "--rows", rows]
    assert script.main([*texts, *STEPS, *named, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Examples train truncated" in said and ("2 documents in 2 rows" in said) == (rows == "pack")


def test_a_run_that_was_stopped_ends_as_one_in_one_piece(script, texts, start, tmp_path):
    steps = [*STEPS, "--save_steps", "2", "--lr_scheduler_type", "constant"]
    assert script.main([*texts, *steps, *start, "--max_steps", "5", "--output_dir", str(tmp_path / "whole")]) == 0
    assert script.main([*texts, *steps, *start, "--output_dir", str(tmp_path / "parts")]) == 0
    resume = ["--resume", str(tmp_path / "parts" / "checkpoint-2"), "--max_steps", "5"]
    assert script.main([*texts, *steps, *start, *resume, "--output_dir", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    assert metrics(tmp_path / "whole")["bits_per_byte"] == metrics(tmp_path / "parts")["bits_per_byte"]


def test_it_starts_from_a_model_of_ours_and_from_llama(script, texts, trained, tokenizers, tmp_path):
    still = [*texts, *STEPS, "--learning_rate", "0"]
    assert script.main([*still, "--model", str(trained), "--output_dir", str(tmp_path / "ours")]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "ours"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).eval()
    llama.save_pretrained(tmp_path / "llama")
    named = ["--model", str(tmp_path / "llama"), "--tokenizer", tokenizers["start"]]
    assert script.main([*still, *named, "--output_dir", str(tmp_path / "theirs")]) == 0
    ids = torch.randint(320, (2, 9))
    with torch.no_grad():
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()(ids).logits
        torch.testing.assert_close(converted, llama(ids).logits, atol=1e-5, rtol=1e-5)


# PEFT looked on the Hub for a base called None
@pytest.mark.filterwarnings("error:Could not find a config file")
def test_adapters_know_what_they_belong_to(script, load_script, texts, tokenizers, tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "llama")
    named = ["--model", str(tmp_path / "llama"), "--tokenizer", tokenizers["start"], "--use_peft", "true"]
    arguments = [*texts, *STEPS, *named, "--lora_r", "2", "--output_dir", str(tmp_path / "lora")]
    assert script.main([*arguments, "--prompts", "the film", "--max_new_tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "\nthe film" in said and "new process" not in said
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "llama")
    assert (tmp_path / "lora" / "adapter_base.json").is_file()
    measured = metrics(tmp_path / "lora")
    assert script.main(arguments) == 0
    assert metrics(tmp_path / "lora")["bits_per_byte"] == measured["bits_per_byte"]
    judged = ["--eval_files", texts[3], "--sample_by", "document", "--max_length", str(LENGTH), *named[:4]]
    assert load_script("evaluate").main([*judged, "--output_dir", str(tmp_path / "judged")]) == 0
    before = metrics(tmp_path / "judged")["bits_per_byte"]
    assert measured["baselines"]["without adapters"] == pytest.approx(before, abs=1e-6) != measured["bits_per_byte"]
    assert "| without adapters | " in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    merge = load_script("merge_lora")  # without `--base`: the folder says what it is
    assert merge.main(["--adapter", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "merged")]) == 0
    forward = count_costs(AutoConfig.from_pretrained(tmp_path / "merged"), LENGTH).flops
    assert measured["flops_per_token"] == 2 * forward


@pytest.mark.slow
def test_new_processes_go_on_with_prompts_alike(script, texts, start, tmp_path, capsys):
    arguments = [*texts, *STEPS, *start, "--prompts", "fox", "the qu", "--output_dir", str(tmp_path)]
    assert script.main([*arguments, "--max_new_tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert "\nfox" in said and "\nthe qu" in said
    assert said.count("the same answers") == 2, said
    assert script.main([*arguments, "--max_new_tokens", "7"]) == 0  # longer than what is saved: shown, not compared
    said = capsys.readouterr().out
    assert "\nfox" in said and "the same answers" not in said


def test_minutes_end_a_run_instead_of_steps(script, texts, start, tmp_path):
    assert script.main([*texts, *STEPS, *start, "--minutes", "1e-6", "--output_dir", str(tmp_path)]) == 0
    assert metrics(tmp_path)["steps"] == 1


def test_the_command_line_changes_the_form(script, texts, start, tmp_path):
    change = ["--set", "attention_patterns=[sliding_window:5, full]"]
    assert script.main([*texts, *STEPS, *start, *change, "--output_dir", str(tmp_path)]) == 0
    assert "- sliding_window:5" in ModelCard.load(tmp_path / "README.md").text


def test_a_dry_run_tells_and_writes_nothing(script, texts, start, tmp_path, capsys):
    assert script.main([*texts, *start, "--dry_run", "true", "--output_dir", str(tmp_path / "run")]) == 0
    assert "this was a dry run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--eval_stride", "24"], "The stride must be at least 1 and below `max_length=24`, got 24."),
        (["--max_length", "1"], "`max_length=1` must be at least 2 tokens"),
        (["--form", "bert-base"], "`form` is a variform_encoder; this script trains"),
        (["--form", "gpt2", "--max_length", "2000"], "`max_length=2000` exceeds the model's table of 1024"),
        (["--rows", "packed"], "`rows` must be one of join, pack, pad, got 'packed'; did you mean `pack`"),
        (["--model", "nowhere"], "Give `form`, to train a new model, or `model`, to go on from one: not both."),
        (["--eval_files", "nothing.txt"], "`eval_files`: there is no file nothing.txt"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(script, texts, start, tmp_path, arguments, sentence):
    given = [*texts, *STEPS, *start, *arguments, "--output_dir", str(tmp_path)]  # the last word wins
    with pytest.raises(ValueError) as refused:
        script.main(given)
    assert sentence in str(refused.value)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_mistake_ends_with_one_sentence(script, texts, start, tmp_path, monkeypatch, capsys):
    argv = ["causal_lm.py", *texts, *start, "--output_dir", str(tmp_path), "--eval_stride", "24"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        script.run_script(script.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: The stride must be at least 1 and below `max_length=24`, got 24.\n"


def test_the_recipe_keeps_within_its_size():
    import variform

    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "long_text.yaml").read_text(encoding="utf-8"))
    assert len(recipe) + len(recipe["form"]) - 1 <= 25
    model = variform.from_config({**recipe["form"], "vocab_size": 257})
    assert 1e6 <= model.num_parameters() <= 2.1e6
