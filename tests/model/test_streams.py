"""Residual streams: what each sublayer reads and adds to, against the two lines of the paper."""

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from variform.model.positions import count_positions

TWO = {"residual_streams": 2, "tie_word_embeddings": False}


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_two_streams_are_those_of_a_reversible_network(shape):
    """`y1 = x1 + Attn(norm(x2))`, `y2 = x2 + FF(norm(y1))`; the last norm is over both. With gradients."""
    model = build(tiny(shape, **TWO, position_embedding_type="learned", layer_scale_init=0.5, norm_type="layer_norm"))
    ids, mask = pad(inputs(), 2, 1)
    caught = {}
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args, kw: caught.update(kw), with_kwargs=True)
    output = model(ids, mask, use_cache=False)[0]
    first = second = model.embeddings(model.embed_tokens(ids), count_positions(mask))
    for number, layer in enumerate(model.layers):
        branch, _ = layer.self_attn(layer.attention_residual.input_norm(second), **{**caught, "layer_idx": number})
        first = first + layer.attention_residual.layer_scale(branch)
        second = second + layer.mlp_residual.layer_scale(layer.mlp(layer.mlp_residual.input_norm(first)))
    expected = model.norm(torch.cat((first, second), dim=-1))
    assert output.shape == (*ids.shape, 24)
    parameters, real = list(model.parameters()), mask.bool()
    results = [
        (states[real], *torch.autograd.grad(states[real].cos().sum(), parameters)) for states in (output, expected)
    ]
    for found, wanted in zip(*results):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_stream_is_both():
    """A layer whose feed-forward gives nothing adds its attention to the one stream as to the first of two."""
    ids = inputs()
    states = []
    for fields in ({}, TWO):
        model = build(tiny("decoder", num_hidden_layers=1, final_norm=False, **fields))
        model.layers[0].mlp.down_proj.weight.zero_()
        states.append(model(ids)[0])
    assert_close(states[1][..., :12], states[0])
    assert not torch.allclose(states[1][..., 12:], states[0], atol=1e-3)


@torch.no_grad()
def test_a_memory_holds_the_stream_that_attention_reads():
    model = build(tiny("decoder", **TWO, memory_length=20))
    ids, cache = inputs(2, 15), model.new_cache()
    pieces = [model(piece, past_key_values=cache)[0] for piece in ids.split([6, 1, 8], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False)[0], rtol=1e-4, atol=1e-5)
    assert cache.layers[0].keys.shape[-1] == 12


@pytest.mark.parametrize("has_transform", [False, True])
@pytest.mark.parametrize("embedding_size", [None, 6])
def test_heads_read_both_streams(has_transform, embedding_size):
    fields = {**TWO, "lm_head_transform": has_transform, "embedding_size": embedding_size}
    for shape, auto_class in (("encoder", AutoModelForMaskedLM), ("decoder", AutoModelForCausalLM)):
        model = build(tiny(shape, **fields), auto_class)
        assert model.lm_head.weight.shape == (19, 24)
        assert isinstance(model.head_transform, torch.nn.Identity) is not has_transform


@torch.no_grad()
def test_a_decoder_attends_to_both_streams_of_an_encoder():
    model = build(tiny("encoder_decoder", encoder={"residual_streams": 2}), AutoModelForSeq2SeqLM)
    encoded = model.get_encoder()(inputs())
    assert encoded.last_hidden_state.shape[-1] == 24
    assert model.model.decoder.layers[0].cross_attn.k_proj.in_features == 24
    expected = model(inputs(), decoder_input_ids=inputs(2, 4)).logits
    for stream in (slice(0, 12), slice(12, 24)):
        encoded.last_hidden_state[..., stream] += 1
        changed = model(encoder_outputs=encoded, decoder_input_ids=inputs(2, 4)).logits
        assert not torch.allclose(changed, expected, atol=1e-3)
        encoded.last_hidden_state[..., stream] -= 1
