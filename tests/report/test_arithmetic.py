"""Closed arithmetic over a config's fields gives what counting a model's modules gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import forms

import variform
from variform.report.arithmetic import count_closed
from variform.report.costs import count_costs


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
@settings(max_examples=30)
@given(data=st.data())
def test_random_forms_are_counted_as_their_modules_are(shape, data):
    _, fields = data.draw(forms(shape))
    config = variform.forms.config_from_dict({"model_type": f"variform_{shape}", **fields})
    for length in (None, 7):
        assert count_closed(config, length) == count_costs(config, length)


@pytest.mark.parametrize("name", variform.list_forms())
def test_published_forms_are_counted_as_their_modules_are(name):
    config = variform.load_config(name)
    assert count_closed(config, 300) == count_costs(config, 300)
