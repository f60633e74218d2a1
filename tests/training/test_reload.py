"""Another process computes what this one does, or what differs is reported."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, inputs, tiny
from transformers import AutoModelForCausalLM

from variform.training.reload import answers_of_new_process, outputs_of, prove_outputs, relative_difference

LOADED = {"auto_class": "AutoModelForCausalLM", "remote_code": True}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        answers_of_new_process(tmp_path, ["cat"], remote_code=True)


def test_code_that_computes_something_else_is_found_out(tmp_path):
    model = build(tiny("decoder", attention_patterns=["sliding_window:3"]), AutoModelForCausalLM)
    model.save_pretrained(tmp_path)
    batch = {"input_ids": inputs()}
    expected = outputs_of(model, batch)
    assert set(expected) == {"logits", "generated"}
    path = tmp_path / "feed_forward.py"
    code = path.read_text(encoding="utf-8")
    assert code.count("return self.down_proj(") == 1
    path.write_text(code.replace("return self.down_proj(", "return 1.01 * self.down_proj("), encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"in a new process, gives another `logits`: \S+ of its largest entry"):
        prove_outputs(tmp_path, expected, batch, **LOADED)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    model = build(tiny("decoder"), AutoModelForCausalLM)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"not every tensor has its place: .*model\.norm\.weight"):
        prove_outputs(tmp_path, {}, {"input_ids": inputs()}, **LOADED)


def test_a_difference_is_measured_against_the_largest_entry():
    expected = torch.tensor([0.0, -4.0])
    assert relative_difference(expected.clone(), expected) == 0
    assert relative_difference(torch.tensor([1.0, -4.0]), expected) == 0.25
    assert not relative_difference(torch.tensor([float("nan"), -4.0]), expected) <= 1
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
