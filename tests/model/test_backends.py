"""Attention backends give one result: the random forms hold eager and sdpa together, this file the others and the edges."""

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, StaticCache

SCHEMES = ["none", "rope", "relative_bias", "alibi", "transformer_xl"]


def by_backend(config, *backends, auto_class=None):
    options = {} if auto_class is None else {"auto_class": auto_class}
    return [build(config, attn_implementation=backend, **options) for backend in backends]


def padded(batch=2, length=7, left=2):
    ids, mask = pad(inputs(batch, length), left)
    mask[1] = 1
    return ids, mask


# Heads of 16 channels, the fewest that flex_attention takes
WIDE = {"hidden_size": 16, "head_dim": 16, "num_hidden_layers": 1}
FLEX_FORMS = {
    "causal rope": ("decoder", {}),
    "causal window": ("decoder", {"attention_patterns": ["sliding_window:3"]}),
    "both ways": ("encoder", {"position_embedding_type": "learned"}),
    "both ways window": ("encoder", {"attention_patterns": ["sliding_window:2"]}),
    "grouped": ("decoder", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "softcap": ("decoder", {"attn_logit_softcapping": 2.0}),
    "alibi": ("decoder", {"position_embedding_type": "alibi"}),
    "relative bias": ("encoder", {"position_embedding_type": "relative_bias"}),
    "transformer-xl both ways": ("encoder", {"position_embedding_type": "transformer_xl"}),
    "transformer-xl": (
        "decoder",
        {"position_embedding_type": "transformer_xl", "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "relative bias and window": (
        "decoder",
        {"position_embedding_type": "relative_bias", "attention_patterns": ["sliding_window:3"]},
    ),
}


@torch.no_grad()
def check_flex(shape, fields):
    eager, flex = by_backend(tiny(shape, **WIDE, **fields), "eager", "flex_attention")
    ids, mask = padded(length=14)
    real = mask.bool()
    assert_close(flex(ids, mask)[0][real], eager(ids, mask)[0][real], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX_FORMS)
def test_flex_attention_equals_eager(name):
    """Uncompiled: the same masks and score functions, without half a minute of compiling each."""
    with torch.compiler.set_stance("force_eager"):
        check_flex(*FLEX_FORMS[name])


def test_compiled_flex_attention_equals_eager():
    check_flex(*FLEX_FORMS["relative bias and window"])


def test_flex_attention_with_sinks_says_where_it_runs():
    model = build(tiny("decoder", attention_sinks=True, **WIDE), attn_implementation="flex_attention")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match="sinks cannot be run on CPU with flex attention"),
    ):
        model(inputs())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@torch.no_grad()
def test_sdpa_equals_eager_on_a_row_of_padding(shape, scheme):
    eager, sdpa = by_backend(tiny(shape, position_embedding_type=scheme), "eager", "sdpa")
    ids, mask = padded()
    mask[0] = 0
    assert_close(sdpa(ids, mask)[0], eager(ids, mask)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sdpa_equals_eager_on_the_padding_itself(scheme, side):
    """A padded token's own state is the same, too: it sees the real tokens that its pattern lets it see, or nothing."""
    eager, sdpa = by_backend(tiny("decoder", position_embedding_type=scheme), "eager", "sdpa")
    ids, mask = pad(inputs(), *((3, 0) if side == "left" else (0, 3)))
    assert_close(sdpa(ids, mask)[0], eager(ids, mask)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_half_precision_is_near_single(scheme, dtype):
    exact = build(tiny("decoder", position_embedding_type=scheme))
    ids, mask = padded()
    real, expected = mask.bool(), exact(ids, mask)[0]
    for backend in ("eager", "sdpa"):
        model = build(tiny("decoder", position_embedding_type=scheme), attn_implementation=backend).to(dtype)
        output = model(ids, mask)[0]
        assert output.dtype == dtype
        assert_close(output[real].float(), expected[real], rtol=0.1, atol=0.15)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_a_mask_of_ones_is_no_mask(backend):
    (model,) = by_backend(tiny("decoder"), backend)
    ids = inputs()
    assert_close(model(ids, torch.ones_like(ids))[0], model(ids)[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_a_mask_made_beforehand_is_taken_as_it_is(backend):
    """Additive, `(batch, 1, queries, keys)`."""
    (model,) = by_backend(tiny("encoder"), backend)
    ids, mask = padded()
    hidden = (mask == 0)[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    additive = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    real = mask.bool()
    expected = model(ids, mask)[0][real]
    assert_close(model(ids, additive, position_ids=positions)[0][real], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patterns", [["full"], ["sliding_window:3", "full"]])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_static_cache_decodes_as_none(scheme, backend, patterns):
    config = tiny("decoder", position_embedding_type=scheme, attention_patterns=patterns)
    (model,) = by_backend(config, backend, auto_class=AutoModelForCausalLM)
    ids, mask = padded()
    whole = model(ids, mask).logits
    cache, pieces = StaticCache(config=config, max_cache_len=16), []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        pieces.append(model(ids[:, start:end], mask[:, :end], past_key_values=cache).logits)
    real = mask.bool()
    assert_close(torch.cat(pieces, dim=1)[real], whole[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "learned"])
def test_generation_with_any_cache_is_generation_without(scheme, cache):
    config = tiny("decoder", position_embedding_type=scheme, attention_patterns=["sliding_window:3", "full"])
    model = build(config, AutoModelForCausalLM)
    ids, mask = pad(inputs(), 2)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    without = model.generate(ids, use_cache=False, **options)
    # A compiled step is the same step, minutes later
    found = model.generate(ids, cache_implementation=cache, disable_compile=True, **options)
    assert_close(found, without, rtol=0, atol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_pair_with_a_cache_is_generation_without(beams):
    model = build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM)
    ids, mask = pad(inputs(), 0, 2)
    mask[1] = 1
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "num_beams": beams,
        "do_sample": False,
        "eos_token_id": None,
    }
    assert_close(model.generate(ids, **options), model.generate(ids, use_cache=False, **options), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["relative_bias", "alibi", "transformer_xl"])
def test_flash_attention_is_refused_where_scores_have_a_bias(scheme):
    model = build(tiny("decoder", position_embedding_type=scheme))
    with pytest.raises(ValueError, match=f"cannot express `position_embedding_type='{scheme}'`; use 'eager'"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_weights_are_given_where_the_backend_has_them(backend):
    (model,) = by_backend(tiny("encoder"), backend)
    attentions = model(inputs(), output_attentions=backend == "eager").attentions
    if backend == "eager":
        assert [weights.shape for weights in attentions] == [(2, 3, 7, 7)] * 2
        assert_close(attentions[0].sum(-1), torch.ones(2, 3, 7))
    else:
        assert not attentions
