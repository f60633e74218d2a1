"""Damaged, missing and foreign weights: each is refused with the file's name, or loads bit by bit as it was saved."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, build, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from variform.loading import find_nonfinite, load_strictly

SHAPES = list(CONFIGS)
LM = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
NAME = "model.safetensors"


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """A folder with a model, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(tiny(request.param), LM[request.param])
    model.save_pretrained(folder)
    return folder, model, LM[request.param]


@pytest.fixture
def copied(saved, tmp_path):
    folder, model, auto_class = saved
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", model, auto_class


def change(folder, edit):
    """Writes the tensors anew after `edit` has changed the dict of them."""
    tensors = load_file(folder / NAME)
    edit(tensors)
    save_file(tensors, folder / NAME, metadata={"format": "pt"})


def assert_equal(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_whole_checkpoint_loads_bit_by_bit(saved):
    folder, model, auto_class = saved
    assert_equal(load_strictly(auto_class, folder), model)


def test_shards_load_and_a_missing_one_is_named(copied):
    folder, model, auto_class = copied
    (folder / NAME).unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_equal(load_strictly(auto_class, folder), model)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load_strictly(auto_class, folder)


def test_a_shard_outside_the_folder_is_refused(copied):
    folder, model, auto_class = copied
    (folder / NAME).rename(folder.parent / "secret.safetensors")
    names = dict.fromkeys(model.state_dict(), "../secret.safetensors")
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match="leads out of"):
        load_strictly(auto_class, folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: (2**26).to_bytes(8, "little") + data[8:],
        lambda data: b"\0" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
    ],
    ids=["empty", "4 bytes", "one short", "half", "one more", "header of 2^62", "header of 2^26", "no header", "list"],
)
def test_a_damaged_file_is_named(copied, damage):
    folder, _, auto_class = copied
    (folder / NAME).write_bytes(damage((folder / NAME).read_bytes()))
    with pytest.raises(ValueError, match=rf"{folder / NAME} is not a whole safetensors file .*save it again"):
        load_strictly(auto_class, folder)


def test_missing_tensors_are_named_and_may_be_allowed(copied, caplog):
    folder, _, auto_class = copied
    lost = [name for name in load_file(folder / NAME) if "layers.1." in name]
    change(folder, lambda tensors: [tensors.pop(name) for name in lost])
    with pytest.raises(ValueError, match=rf"{folder / NAME} lacks .*layers\.1\..* more; download"):
        load_strictly(auto_class, folder)
    assert load_strictly(auto_class, folder, allow_missing=True).num_parameters() > 0


def test_a_tensor_that_the_form_does_not_have_is_named(copied):
    folder, _, auto_class = copied
    change(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(ValueError, match=rf"{folder / NAME} has beyond the form extra; "):
        load_strictly(auto_class, folder)


def test_a_tensor_of_another_shape_is_refused_with_the_file(copied):
    folder, _, auto_class = copied
    change(
        folder, lambda tensors: [tensors.update({n: t[:-1].clone()}) for n, t in [*tensors.items()] if "q_proj" in n]
    )
    with pytest.raises(ValueError, match=rf"{folder / NAME} does not fit {folder / 'config.json'}"):
        load_strictly(auto_class, folder)


def test_a_tensor_of_integers_is_named(copied):
    folder, _, auto_class = copied
    change(folder, lambda tensors: [tensors.update({n: t.int()}) for n, t in [*tensors.items()] if "0.mlp.up_" in n])
    with pytest.raises(ValueError, match=rf"{folder / NAME} holds no floating-point numbers in .*up_proj"):
        load_strictly(auto_class, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(copied, value):
    folder, _, auto_class = copied

    def spoil(tensors):
        for name, tensor in tensors.items():
            if "layers.1.self_attn.v_proj" in name:
                tensor.view(-1)[3] = value

    change(folder, spoil)
    with pytest.raises(ValueError, match=rf"{folder / NAME} holds NaN or infinity in .*layers\.1\.self_attn\.v_proj"):
        load_strictly(auto_class, folder)
    assert all("layers.1.self_attn.v_proj" in name for name in find_nonfinite(auto_class.from_pretrained(folder)))


def test_a_new_head_may_stand_on_a_whole_body(tmp_path):
    build(tiny("encoder"), AutoModelForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks classifier"):
        load_strictly(AutoModelForSequenceClassification, tmp_path)
    model = load_strictly(AutoModelForSequenceClassification, tmp_path, new_head=True, num_labels=3)
    assert model.config.num_labels == 3
    change(tmp_path, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_strictly(AutoModelForSequenceClassification, tmp_path, new_head=True)


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A folder whose file is damaged again and again, its bytes, the length of the header, and the model."""
    folder = tmp_path_factory.mktemp("victim")
    model = build(tiny("decoder", num_hidden_layers=1))
    model.save_pretrained(folder)
    data = (folder / NAME).read_bytes()
    return folder, data, 8 + int.from_bytes(data[:8], "little"), model


def check_refused_or_equal(victim, data):
    folder, _, _, model = victim
    (folder / NAME).write_bytes(data)
    try:
        loaded = load_strictly(AutoModel, folder)
    except ValueError as error:
        assert str(folder / NAME) in str(error), error
        return
    assert_equal(loaded, model)


@pytest.mark.parametrize("count", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_any_byte_of_the_header_changed_is_refused_with_the_file_or_harmless(victim, count):
    @given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
    @example(place=0.0, value=255)
    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    def check(place, value):
        _, data, header, _ = victim
        index = int(place * header)
        check_refused_or_equal(victim, data[:index] + bytes([value]) + data[index + 1 :])

    check()


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_a_file_cut_anywhere_is_refused_with_its_name(victim, kept):
    folder, data, _, _ = victim
    (folder / NAME).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=str(folder / NAME)):
        load_strictly(AutoModel, folder)
