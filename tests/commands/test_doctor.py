"""`variform doctor`, as it is typed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import variform
from variform.cli import main
from variform.report import checkup


def save(folder, config, words: int | None = None):
    variform.from_config(config).save_pretrained(folder)
    if words is not None:
        tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return str(folder)


def diagnose(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, " ".join(capsys.readouterr().out.split())


def test_a_healthy_machine_trains_each_shape(capsys):
    status, said = diagnose(capsys)
    assert status == 0 and said.endswith("Nothing is wrong.")
    for name in ("EncoderForMaskedLM", "DecoderForCausalLM", "EncoderDecoderForConditionalGeneration"):
        assert re.search(rf"ok training: Variform{name}: 2 steps, losses \d\.\d+, \d\.\d+", said)
    assert f"torch: {torch.__version__}" in said and "ok HF cache:" in said


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
def test_a_healthy_model_is_not_changed_on_disk(shape, tmp_path, capsys):
    folder = save(tmp_path / "model", tiny(shape), words=19)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    status, said = diagnose(capsys, folder)
    assert status == 0, said
    assert "every number finite" in said and "19 tokens in the" in said and "sdpa, without a mask" in said
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("command", ["doctor", "info"])
def test_an_adapter_is_told_from_a_model(command, tmp_path, capsys):
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="some/base")
    get_peft_model(variform.from_config(tiny("decoder")), config).save_pretrained(tmp_path / "adapter")
    assert main([command, str(tmp_path / "adapter")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds an adapter of" in said and "merge the two with finetune/merge_lora.py" in said


def test_a_broken_weight_is_named(tmp_path, capsys):
    folder = save(tmp_path / "model", tiny("decoder"))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    status, said = diagnose(capsys, folder)
    assert status == 1
    assert "wrong weights: model.norm.weight in model.safetensors has 1 numbers that are NaN or infinite" in said
    assert "wrong training:" in said and said.endswith("2 wrong.")


def test_a_tokenizer_that_exceeds_the_vocabulary_is_wrong(tmp_path, capsys):
    status, said = diagnose(capsys, save(tmp_path / "model", tiny("encoder"), words=21))
    assert status == 1
    assert "has 21 tokens, and the encoder `vocab_size=19`: call `model.resize_token_embeddings(21)`" in said


def test_a_checkpoint_that_does_not_load_is_wrong(tmp_path, capsys):
    folder = save(tmp_path / "model", tiny("decoder"))
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_key_value_heads": 3', '"num_key_value_heads": 2'))
    status, said = diagnose(capsys, folder)
    assert status == 1 and "does not load: `num_key_value_heads=2` does not divide `num_attention_heads=3`" in said


@pytest.mark.parametrize("arguments", [["./nowhere"], ["bert-bsae-uncased/x/y"], ["bert-base", "--length", "0"]])
def test_bad_input_is_one_sentence(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def findings_under(monkeypatch, **variables: str | None) -> str:
    """What is said of the environment in a process with other variables; None takes one away."""
    environment = {**os.environ, **{name: value for name, value in variables.items() if value is not None}}
    for name in (name for name, value in variables.items() if value is None):
        environment.pop(name, None)
    code = "from variform.report.checkup import look_at_environment\nfor f in look_at_environment(): print(*f)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cache_that_cannot_be_written_is_named_with_the_mend(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = findings_under(monkeypatch, HF_HOME=str(tmp_path / "file"), HOME=None, HF_HUB_CACHE=None)
    assert f"wrong HF cache {tmp_path / 'file' / 'hub'} cannot be written to" in said
    assert "set HF_HOME to a folder that can be written to" in said
    assert "note HOME is not set" in said


def test_versions_out_of_range_are_wrong(monkeypatch):
    versions = {"torch": "1.0", "transformers": None}
    real = checkup.version_of
    monkeypatch.setattr(checkup, "version_of", lambda name: versions.get(name, real(name)))
    found = {finding.about: finding for finding in checkup.look_at_versions()}
    assert found["torch"].verdict == "wrong" and "1.0, needed is >=" in found["torch"].words
    assert found["transformers"].verdict == "wrong" and "is not installed: `pip install" in found["transformers"].words
    assert found["safetensors"].verdict == "ok"
