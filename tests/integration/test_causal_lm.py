"""The script for bytes of long text on two tiny files: trained, judged, published, loaded back; resumed as if in one piece."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import variform

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "long_text.yaml"
CONTEXT = 24


@pytest.fixture(scope="module")
def script():
    """finetune/causal_lm.py as a module."""
    spec = importlib.util.spec_from_file_location("causal_lm", ROOT / "finetune" / "causal_lm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The recipe with a model of a few thousand parameters, and three tiny documents."""
    folder = tmp_path_factory.mktemp("texts")
    for name, times in {"a": 9, "b": 5, "judged": 4}.items():
        (folder / f"{name}.txt").write_bytes(f"{name}: the quick br\u00f6wn fox jumps\n".encode() * times)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["form"] |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    recipe |= {"context": CONTEXT, "max_steps": 2, "logging_steps": 1, "train_files": [str(folder / "[ab].txt")]}
    recipe |= {"eval_files": [str(folder / "judged.txt")], "use_cpu": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["--config", str(folder / "recipe.yaml")]


def held_out(flags: list[str]) -> bytes:
    return Path(flags[1]).with_name("judged.txt").read_bytes()


def test_the_published_model_goes_on_with_prompts_in_new_processes(script, flags, tmp_path, capsys):
    script.main([*flags, "--output_dir", str(tmp_path), "--prompts", "fox", "the qu"])
    said = capsys.readouterr().out
    assert "\nfox" in said and "\nthe qu" in said
    assert said.count("the same answers") == 2, said


def test_train_judge_publish_and_measure_again(script, flags, tmp_path, capsys):
    assert script.main([*flags, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 documents" in said and "judged: " in said
    measured = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (measured["bytes"], measured["steps"], measured["tokens_per_step"]) == (len(held_out(flags)), 2, CONTEXT)
    assert measured["tokens_per_second"] > 0 and measured["process_seconds_per_step"] > 0
    assert f"{measured['bits_per_byte']:.3f} bits per byte" in ModelCard.load(tmp_path / "README.md").text

    assert script.main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert "holds a trained model" in capsys.readouterr().out
    again = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    timing = {"eval_tokens_per_second": None}
    assert again | timing == measured | timing


def test_a_run_can_start_from_another_model(script, flags, tmp_path, capsys):
    script.main([*flags, "--output_dir", str(tmp_path / "first")])
    start = ["--start_from", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")]
    script.main([*flags, *start, "--learning_rate", "0"])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "hidden_size: 8" in ModelCard.load(tmp_path / "second" / "README.md").text
    with pytest.raises(ValueError, match="`attention_patterns` are those of `start_from`"):
        script.main([*flags, *start[:2], "--output_dir", str(tmp_path / "third"), "--attention_patterns", "full"])
    other = tmp_path / "words"
    variform.from_config({**yaml.safe_load(RECIPE.read_text())["form"], "vocab_size": 99}).save_pretrained(other)
    with pytest.raises(ValueError, match="vocabulary of 99 tokens; this script's models read bytes, 257"):
        script.main([*flags, "--start_from", str(other), "--output_dir", str(tmp_path / "third")])


def test_bits_per_byte_are_those_of_one_byte_after_the_other(script, flags, tmp_path):
    script.main([*flags, "--output_dir", str(tmp_path), "--eval_stride", "5"])
    measured = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path)(held_out(flags).decode())["input_ids"]
    assert tokens == [256, *held_out(flags)]
    nats, begin, reached = 0.0, 0, CONTEXT
    for place in range(1, len(tokens)):
        if place == reached:  # the next window
            reached = min(reached + 5, len(tokens))
            begin = reached - CONTEXT
        with torch.no_grad():
            logits = model(torch.tensor([tokens[begin:place]])).logits[0, -1]
        nats += F.cross_entropy(logits, torch.tensor(tokens[place])).item()
    expected = nats / math.log(2) / (len(tokens) - 1)
    assert measured["smallest_context"] == CONTEXT - 5
    assert measured["bits_per_byte"] == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_ends_where_one_in_one_piece_does(script, flags, tmp_path):
    steps = ["--max_steps", "7", "--save_steps", "4", "--lr_scheduler_type", "constant"]
    script.main([*flags, *steps, "--output_dir", str(tmp_path / "whole")])
    script.main([*flags, *steps, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4"])
    (tmp_path / "parts" / "model.safetensors").unlink()
    script.main([*flags, *steps, "--output_dir", str(tmp_path / "parts")])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=0, msg=name)
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "parts")]
    assert [state["stateful_callbacks"]["StepTimer"]["attributes"]["steps"] for state in states] == [7, 7]


def test_the_seed_fixes_the_run_and_another_one_is_another_run(script, flags, tmp_path):
    weights = []
    for run, seed in enumerate(("3", "3", "4")):
        script.main([*flags, "--output_dir", str(tmp_path / str(run)), "--seed", seed])
        weights.append(load_file(tmp_path / str(run) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_command_line_chooses_the_pattern(script, flags, tmp_path):
    patterns = ["sliding_window:5", "full"]
    script.main([*flags, "--output_dir", str(tmp_path), "--attention_patterns", *patterns])
    given = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["attention_patterns"]
    assert variform.VariformDecoderConfig(attention_patterns=patterns).attention_patterns == given
    assert "- sliding_window:5" in ModelCard.load(tmp_path / "README.md").text


def test_minutes_end_the_run_instead_of_the_steps(script, flags, tmp_path):
    script.main([*flags, "--output_dir", str(tmp_path), "--minutes", "1e-6", "--max_steps", "9"])
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["steps"] == 1


def test_a_mistake_ends_with_one_sentence(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags, "--output_dir", str(tmp_path), "--eval_stride", "24"])
    with pytest.raises(SystemExit) as ended:
        script.run_script(script.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: The stride must be at least 1 and below `context=24`, got 24.\n"


def test_the_recipe_keeps_within_its_size():
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert len(recipe) + len(recipe["form"]) - 1 <= 25
    model = variform.from_config({**recipe["form"], "vocab_size": 257})
    assert 1e6 <= model.num_parameters() <= 2.1e6
