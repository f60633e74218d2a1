"""What is read, checked, counted and mended without torch is what the real classes say, to the letter."""

import json
import random
import sys

import pytest
import yaml
from hypothesis import given, settings
from strategies import forms, sample, wild_forms

import variform
from variform.commands.info import show
from variform.forms import FORMS, config_from_dict
from variform.light import NeedsTorch, light, without_torch
from variform.nearest import with_mend
from variform.report.form import as_text, describe


def outcome(function, *arguments):
    """What a function returns, or with what it refuses."""
    try:
        return function(*arguments)
    except Exception as error:  # of whatever kind: both must say the same
        return type(error), str(error)


def read_lightly(fields: dict) -> str:
    return light("report.form").as_text(light("report.form").describe(light("forms").config_from_dict(fields), "it"))


def read(fields: dict) -> str:
    return as_text(describe(config_from_dict(fields), "it"))


@settings(max_examples=60)
@given(form=forms())
def test_a_saved_form_reads_as_the_real_classes_read_it(form):
    shape, fields = form
    real = config_from_dict({"model_type": f"variform_{shape}", **fields})
    saved = json.loads(real.to_json_string(use_diff=False))
    try:
        said = read_lightly(saved)
    except NeedsTorch as error:
        assert "a warning to give" in str(error)  # a rotation that transformers thinks odd
    else:
        assert said == read(saved)


@pytest.mark.parametrize("name", variform.list_forms())
def test_published_forms_read_the_same(name, tmp_path):
    variform.load_config(name).save_pretrained(tmp_path)
    for source in (name, str(tmp_path), str(tmp_path / "config.json")):
        with without_torch():
            said = light("report.form").as_text(light("commands.info").show([source], None))
        assert said == as_text(show([source], None))


@pytest.mark.parametrize("other", variform.list_forms())
def test_published_forms_are_compared_the_same(other):
    for name in ("gpt-oss-20b", "led-base"):
        with without_torch():
            said = light("report.form").as_text(light("commands.info").show([name, other], None))
        assert said == as_text(show([name, other], None))


@settings(max_examples=150)
@given(form=wild_forms())
def test_what_the_real_classes_refuse_is_refused_in_the_same_words(form):
    shape, fields = form
    fields = {"model_type": f"variform_{shape}", **fields}
    said = outcome(read_lightly, fields)
    if said[0] is not NeedsTorch:
        assert said == outcome(read, fields)


def spoilt(fields: dict, chance: random.Random) -> dict:
    """A form with a field or two, of either stack of a pair, as another form might have them."""
    spoilt, wild = dict(fields), chance.choice(WILD)
    place = chance.choice([side for side in ("encoder", "decoder") if side in spoilt] or [None])
    names = chance.sample(sorted(wild.keys() - {"model_type"}), 2)
    changes = {name: wild[name] for name in names} | chance.choice([{}, {"hiden_size": 8}])
    return {**spoilt, place: {**spoilt[place], **changes}} if place else {**spoilt, **changes}


WILD = [fields for _, fields in sample(wild_forms(), 60)]


@pytest.mark.parametrize("name", variform.list_forms())
def test_refused_forms_come_with_the_same_nearest_ones(name):
    chance = random.Random(name)
    fields = yaml.load((FORMS / f"{name}.yaml").read_text(), variform.forms.FormLoader)
    mend_lightly, read_it_lightly = light("nearest").with_mend, light("forms").config_from_dict
    for form in [spoilt(fields, chance) for _ in range(6)]:
        refused = outcome(config_from_dict, form)
        if isinstance(refused, tuple):
            assert outcome(read_it_lightly, form) == refused
            assert mend_lightly(form, refused[1]) == with_mend(form, refused[1])


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({"dtype": "float8_e4m3fn"}, "`dtype=float8_e4m3fn` is for torch"),
        ({"dtype": "flaot32", "hidden_act": "gleu"}, "`dtype=flaot32` is for torch"),
        ({"encoder": {"dtype": ["float32"]}}, "is for torch"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
            "transformers has a warning to give",
        ),
    ],
)
def test_what_only_the_real_ones_can_say_is_left_to_them(fields, doubt):
    shape = "encoder_decoder" if "encoder" in fields else "decoder"
    with pytest.raises(NeedsTorch, match=doubt):
        light("forms").config_from_dict({"model_type": f"variform_{shape}", **fields})


def test_a_folder_that_names_foreign_code_is_refused(tmp_path):
    config = variform.load_config("bert-base").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "me/my-kernel"}))
    with without_torch():
        said = outcome(light("commands.info").show, [str(tmp_path)], None)
    assert said == outcome(show, [str(tmp_path)], None)
    assert said[0] is ValueError and "would run the code of a repo" in said[1]


def test_the_real_modules_are_untouched():
    before = dict(sys.modules)
    with without_torch():
        light("nearest")
        import torch

        assert torch is not before["torch"]
    names = [name for name in {*before, *sys.modules} if name.partition(".")[0] in ("torch", "transformers")]
    assert [name for name in names if sys.modules.get(name) is not before.get(name)] == []


def test_nothing_that_computes_is_there():
    torch = light("model.pattern_base").torch
    with pytest.raises(NeedsTorch, match="arange is not there"):
        torch.arange(3)
    with pytest.raises(NeedsTorch, match="Linear is not there"):
        torch.nn.Linear(2, 3)
