"""Checkpoints saved by an earlier release load, and compute what they computed then."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
FROZEN = {
    "encoder": transformers.AutoModelForMaskedLM,
    "decoder": transformers.AutoModelForCausalLM,
    "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
}


@pytest.fixture(params=FROZEN)
def frozen(request):
    """The folder of a checkpoint, the model in it and what `from_pretrained` has to say about its weights."""
    folder = FIXTURES / request.param
    model, info = FROZEN[request.param].from_pretrained(folder, output_loading_info=True)
    return folder, model.eval(), info


def test_every_weight_finds_its_place(frozen):
    _, _, info = frozen
    assert {name: found for name, found in info.items() if found} == {}


@torch.no_grad()
def test_logits_are_the_recorded_ones(frozen):
    folder, model, _ = frozen
    recorded = load_file(folder / "expected.safetensors")
    expected = recorded.pop("logits")
    torch.testing.assert_close(model(**recorded).logits, expected, rtol=1e-5, atol=1e-5)


def test_saved_again_the_weights_have_the_same_names(frozen, tmp_path):
    folder, model, _ = frozen
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saved_again_the_config_has_the_same_fields(frozen, tmp_path):
    """A field may come to a later release, with a default that changes nothing; none may go or change."""
    folder, model, _ = frozen
    model.config.save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (folder, tmp_path))
    for config in (before, after):
        for key in ("transformers_version", "variform_version", "architectures"):
            config.pop(key, None)
    for side in ("encoder", "decoder"):
        if side in before:
            assert before[side].items() <= after.pop(side).items()
            before.pop(side)
    assert {key: after.get(key) for key in before} == before


@pytest.mark.parametrize("name", FROZEN)
def test_a_fixture_is_small(name):
    assert sum(path.stat().st_size for path in (FIXTURES / name).iterdir()) < 60_000
