"""The kernel that is named is the one that computes."""

import pytest
import torch
from tiny import build, inputs, tiny

from variform.report.kernels import kernels_of, why_not_flash

WIDE = {"max_position_embeddings": 600}


def named(config, length: int = 7, **options):
    from transformers import AutoModelForCausalLM

    auto_class = {"auto_class": AutoModelForCausalLM} if config.model_type == "variform_decoder" else {}
    model = build(config, **auto_class, **options)
    ids = inputs(length=length)
    batch = {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    return {kernel.where: (kernel.name, kernel.why) for kernel in kernels_of(model, batch)}


def test_full_attention_takes_sdpa_without_a_mask():
    assert named(tiny("decoder")) == {"decoder layers 0-1: full": ("sdpa, without a mask", "")}


def test_a_pair_has_three_kinds_of_attention():
    assert list(named(tiny("encoder_decoder"))) == [
        "encoder layers 0-1: full",
        "decoder layers 0-1: full",
        "decoder layers 0-1: cross-attention",
    ]


def test_a_long_text_in_a_window_takes_the_block_kernel():
    config = tiny("encoder", attention_patterns=["sliding_window:4"], **WIDE)
    assert named(config, 512)["encoder layers 0-1: sliding_window:4"] == (
        "block kernel, at the cost of the pattern",
        "",
    )


@pytest.mark.parametrize(
    ("fields", "length", "name", "why"),
    [
        (
            {"attention_patterns": ["sliding_window:4"]},
            20,
            "sdpa, with a dense mask",
            "pays from 256 tokens on, these are 20",
        ),
        ({"attention_patterns": ["sliding_window:9"]}, 5, "sdpa, without a mask", "hides nothing of 5 tokens"),
        ({"attention_patterns": ["sliding_window:400"]}, 512, "sdpa, with a dense mask", "shows too much for a plan"),
        ({"position_embedding_type": "alibi"}, 7, "sdpa, with a dense mask", "adds to the score of each pair"),
        ({"position_embedding_type": "transformer_xl"}, 7, "sdpa, with a dense mask", "by its distance and its query"),
        ({"attention_sinks": True}, 7, "spelled out", "sdpa cannot express `attention_sinks=True`"),
        ({"attn_logit_softcapping": 5.0}, 7, "spelled out", "`attn_logit_softcapping=5.0`"),
    ],
)
def test_why_no_faster_one(fields, length, name, why):
    ((found, reason),) = named(tiny("decoder", **WIDE, **fields), length).values()
    assert found.startswith(name) and why in reason


def test_what_was_asked_for_is_said():
    ((name, why),) = named(tiny("decoder"), attn_implementation="eager").values()
    assert name.startswith("eager") and "was asked for" in why
    ((name, why),) = named(tiny("decoder"), attn_implementation="flex_attention").values()
    assert name.startswith("flex_attention")


def test_shared_layers_are_counted_as_they_run():
    config = tiny("encoder", num_hidden_layers=4, num_hidden_groups=2)
    assert list(named(config)) == ["encoder layers 0-3: full"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "the CPU's own kernel"), ({"experts_layout": "modulelist"}, "one expert after the other")],
)
def test_experts_are_named(fields, name, monkeypatch):
    from variform.model import moe

    calls = []
    run = moe.run_fused
    monkeypatch.setattr(moe, "run_fused", lambda *args: calls.append(1) or run(*args))
    found = named(tiny("decoder", num_experts=4, **fields))
    assert found["decoder layers 0-1: experts"][0].startswith(name)
    assert bool(calls) == (fields == {})


def test_flash_is_refused_by_field_or_by_the_device():
    device = torch.device("cpu")
    assert "`position_embedding_type='alibi'`" in why_not_flash(
        tiny("decoder", position_embedding_type="alibi"), device
    )
    config = tiny("decoder")
    config._attn_implementation = "sdpa"
    assert why_not_flash(config, device) == "FlashAttention needs a GPU, and this is the CPU"
