"""`generate` and stock caches: whatever the strategy, decoding step by step is the full forward."""

from types import SimpleNamespace

import pytest
import torch
from tiny import build, inputs, pad, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, QuantizedCache, StaticCache

# One form for each way in which a cache and positions meet
DECODERS = {
    "rope_window": {"attention_patterns": ["sliding_window:3", "full"], "num_key_value_heads": 1, "qk_norm": "head"},
    "learned": {"position_embedding_type": "learned", "norm_type": "layer_norm"},
    "alibi_window": {"position_embedding_type": "alibi", "attention_patterns": ["full", "sliding_window:4"]},
    "relative_bias": {"position_embedding_type": "relative_bias", "relative_attention_num_buckets": 6},
    "transformer_xl_window": {
        "position_embedding_type": "transformer_xl",
        "attention_patterns": ["sliding_window:3", "full"],
        "num_key_value_heads": 1,
    },
    "sinusoidal_sinks": {"position_embedding_type": "sinusoidal", "attention_sinks": True},
    "none_softcap": {"position_embedding_type": "none", "attn_logit_softcapping": 5.0},
    "shared_layers": {"num_hidden_groups": 1, "embedding_size": 8},
}


def decoder(form: str, **changes):
    # No end of sequence, so that every run is as long as asked for
    return build(tiny("decoder", **{**DECODERS[form], "eos_token_id": None, **changes}), AutoModelForCausalLM)


def encoder_decoder(**changes):
    stacks = {
        "encoder": {"position_embedding_type": "relative_bias", "relative_attention_num_buckets": 8},
        "decoder": {"position_embedding_type": "relative_bias", "relative_attention_num_buckets": 8},
    }
    return build(tiny("encoder_decoder", **{**stacks, "eos_token_id": None, **changes}), AutoModelForSeq2SeqLM)


@torch.no_grad()
def greedy_without_cache(model, input_ids, steps: int, **kwargs) -> torch.Tensor:
    """The definition: the whole sequence again for every token."""
    mask = kwargs.pop("attention_mask", torch.ones_like(input_ids))
    for _ in range(steps):
        logits = model(input_ids, attention_mask=mask, use_cache=False, **kwargs).logits
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return input_ids


@pytest.mark.parametrize("form", DECODERS)
@torch.no_grad()
def test_token_by_token_equals_the_full_forward(form):
    model, (input_ids, mask) = decoder(form), pad(inputs(length=9), left=2)
    mask[0, 2:4] = 0  # rows padded by different lengths
    full = model(input_ids, attention_mask=mask).logits
    cache, steps = DynamicCache(config=model.config), []
    for start, end in [(0, 4), *((i, i + 1) for i in range(4, 11))]:
        output = model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        steps.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], full[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", DECODERS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_is_the_argmax_of_the_full_forward(form, cache):
    model, (input_ids, mask) = decoder(form), pad(inputs(), left=2)
    mask[0, 2:4] = 0
    expected = greedy_without_cache(model, input_ids, 8, attention_mask=mask)
    found = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", DECODERS)
def test_padding_on_the_left_changes_no_token(form):
    model, input_ids = decoder(form), inputs()
    padded, mask = pad(input_ids, left=3)
    expected = model.generate(input_ids, max_new_tokens=6)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(found[:, 3:], expected)


@pytest.mark.parametrize("form", DECODERS)
def test_beam_search_needs_no_cache(form):
    model, (input_ids, mask) = decoder(form), pad(inputs(), left=1)
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(input_ids, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids, **options), expected)


@pytest.mark.parametrize("form", ["rope_window", "learned", "alibi_window"])
def test_sampling_draws_the_same_with_and_without_cache(form):
    model, input_ids, found = decoder(form), inputs(), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 7, "top_p": 0.95, "use_cache": use_cache}
        found.append(model.generate(input_ids, max_new_tokens=8, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["learned", "relative_bias", "shared_layers"])
def test_an_assistant_changes_no_token(form):
    """A smaller form proposes tokens; the cache is cut back to those that were accepted."""
    model, assistant, input_ids = decoder(form), decoder(form, hidden_size=8), inputs(batch=1)
    expected = model.generate(input_ids, max_new_tokens=10)
    assert torch.equal(model.generate(input_ids, max_new_tokens=10, assistant_model=assistant), expected)
    assert torch.equal(model.generate(input_ids, max_new_tokens=10, prompt_lookup_num_tokens=2), expected)


def test_a_continued_conversation_reuses_its_cache():
    model, input_ids, cache = decoder("alibi_window"), inputs(batch=1), DynamicCache()
    first = model.generate(input_ids, max_new_tokens=4, past_key_values=cache)
    second = torch.cat((first, inputs(batch=1, length=3, seed=1)), dim=1)
    assert torch.equal(
        model.generate(second, max_new_tokens=4, past_key_values=cache), model.generate(second, max_new_tokens=4)
    )


@pytest.mark.parametrize("form", ["learned", "alibi_window"])
def test_static_cache_keeps_the_shape_of_every_step(form):
    """Decoding steps that differ in shape would be compiled one by one."""
    model, input_ids, shapes = decoder(form), inputs(), set()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.add(
                (args[0].shape, None if kwargs["attention_mask"] is None else kwargs["attention_mask"].shape)
            ),
            with_kwargs=True,
        )
    cache = StaticCache(config=model.config, max_cache_len=16)
    model.generate(input_ids, max_new_tokens=6, past_key_values=cache, disable_compile=True)
    steps = {shape for shape in shapes if shape[0][1] == 1}
    assert len(steps) == len(set(model.config.layer_types))


@pytest.fixture
def quanto(monkeypatch):
    """quanto, with what its C++ kernel computes in torch's terms: the kernel is compiled on first use, for a minute."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto belongs to the `test` extra")
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed, bits):
        return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)])

    monkeypatch.setattr(ext, "_lib", SimpleNamespace(unpack=unpack))


@pytest.mark.usefixtures("quanto")
@torch.no_grad()
def test_quantized_cache_stays_close_to_the_exact_one():
    model = decoder("learned", hidden_size=64, head_dim=64, num_attention_heads=1)
    input_ids = inputs(length=9)
    cache = QuantizedCache(backend="quanto", config=model.config, nbits=4, residual_length=4, q_group_size=64)
    steps = [model(input_ids[:, :6], past_key_values=cache).logits]
    steps += [model(input_ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 9)]
    full = model(input_ids).logits
    found = torch.cat(steps, dim=1)
    torch.testing.assert_close(found[:, :6], full[:, :6], rtol=1e-4, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(found, full, dim=-1).min() > 0.98
    generated = model.generate(
        input_ids, max_new_tokens=6, cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4}
    )
    assert generated.shape == (2, 15)


@torch.no_grad()
def test_encoder_decoder_token_by_token_equals_the_full_forward():
    model, (source, mask), target = encoder_decoder(), pad(inputs(), left=1, right=2), inputs(length=8, seed=1)
    full = model(source, attention_mask=mask, decoder_input_ids=target).logits
    cache, steps = None, []
    for i in range(8):
        given = {"decoder_input_ids": target[:, i : i + 1], "past_key_values": cache, "use_cache": True}
        output = model(source, attention_mask=mask, **given)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_encoder_decoder_generates_the_same_without_cache(options):
    model, (source, mask) = encoder_decoder(), pad(inputs(), left=1, right=2)
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(source, attention_mask=mask, max_new_tokens=7, use_cache=False, **plain)
    assert torch.equal(model.generate(source, attention_mask=mask, max_new_tokens=7, **options), expected)


def test_encoder_decoder_padding_of_the_source_changes_no_token():
    model, source = encoder_decoder(), inputs()
    padded, mask = pad(source, left=2, right=3)
    expected = model.generate(source, max_new_tokens=6)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_keys_of_the_source_are_computed_once(options):
    model, calls = encoder_decoder(), []
    for layer in model.model.decoder.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate(inputs(), max_new_tokens=6, **options)
    assert len(calls) == model.config.decoder.num_hidden_layers


def test_encoder_decoder_assistant_changes_no_token():
    model, source = encoder_decoder(), inputs(batch=1)
    assistant = encoder_decoder(decoder={"num_hidden_layers": 1, "position_embedding_type": "rope"})
    expected = model.generate(source, max_new_tokens=8)
    assert torch.equal(model.generate(source, max_new_tokens=8, assistant_model=assistant), expected)


def test_generation_of_a_pipeline_stops_at_the_end_token():
    """The first end token ends a row; padding follows it."""
    model = build(tiny("decoder"), AutoModelForCausalLM)
    end = int(model.generate(inputs(), max_new_tokens=3, min_new_tokens=3)[0, -1])
    found = model.generate(inputs(), max_new_tokens=8, eos_token_id=end)
    after = (found[:, 7:] == end).cumsum(1) - (found[:, 7:] == end).long() > 0
    assert (found[:, 7:][after] == model.config.pad_token_id).all()
    assert (found[0, 7:] == end).any()
