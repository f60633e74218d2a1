"""Attention against a loop over batch, heads and queries that follows the definition."""

import math

import pytest
import torch
from tiny import tiny
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from variform.model.attention import Attention, eager_attention
from variform.model.norms import make_norm
from variform.model.positions import RotaryEmbedding

BATCH, LENGTH, SOURCE = 2, 5, 4
FORMS = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "multi-query": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "some biases": {"attention_bias": ["q", "v"]},
    "qk-norm a head": {"qk_norm": "head", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qk-norm full": {"qk_norm": "full", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qk-norm layer_norm": {"qk_norm": "head", "norm_type": "layer_norm"},
    "scale": {"attention_scale": 0.7},
    "softcap": {"attn_logit_softcapping": 0.8},
    "sinks": {"attention_sinks": True},
    "wide heads": {"head_dim": 6},
    "all": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": ["k", "o"],
        "qk_norm": "head",
        "attention_scale": 1.3,
        "attn_logit_softcapping": 0.8,
        "attention_sinks": True,
    },
}


def make_attention(key_value_size=None, is_causal=False, **fields) -> Attention:
    config = tiny("decoder", **fields)
    config._attn_implementation = "eager"
    module = Attention(config, 0, is_causal, key_value_size).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def reference(module: Attention, states, source, hidden, bias=None) -> torch.Tensor:
    """The definition, one query of one head at a time, in float64. hidden: `(batch, queries, keys)`, True for unseen."""
    config = module.config
    num_heads, num_groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(linear, inputs, norm=None):
        out = inputs.double() @ linear.weight.double().T
        if linear.bias is not None:
            out = out + linear.bias.double()
        if norm is None:
            return out.unflatten(-1, (-1, size))
        norm = make_norm(config, norm.weight.shape[0]).double().requires_grad_(False)
        norm.load_state_dict((module.q_norm if linear is module.q_proj else module.k_norm).state_dict())
        if config.qk_norm == "full":
            return norm(out).unflatten(-1, (-1, size))
        return norm(out.unflatten(-1, (-1, size)))

    query = project(module.q_proj, states, module.q_norm)
    key, value = project(module.k_proj, source, module.k_norm), project(module.v_proj, source)
    scale = config.attention_scale if config.attention_scale is not None else 1 / math.sqrt(size)
    output = torch.zeros(*states.shape[:2], num_heads, size, dtype=torch.float64)
    for b in range(states.shape[0]):
        for h in range(num_heads):
            group = h // (num_heads // num_groups)
            for q in range(states.shape[1]):
                seen = [k for k in range(source.shape[1]) if not hidden[b, q, k]]
                scores = [float(query[b, q, h] @ key[b, k, group]) * scale for k in seen]
                if config.attn_logit_softcapping is not None:
                    cap = config.attn_logit_softcapping
                    scores = [cap * math.tanh(score / cap) for score in scores]
                if bias is not None:
                    scores = [score + float(bias[0, h, q, k]) for score, k in zip(scores, seen)]
                total = sum(map(math.exp, scores))
                if module.sinks is not None:
                    total += math.exp(float(module.sinks[h]))
                for score, k in zip(scores, seen):
                    output[b, q, h] += math.exp(score) / total * value[b, k, group]
    merged = output.flatten(-2) @ module.o_proj.weight.double().T
    return (merged if module.o_proj.bias is None else merged + module.o_proj.bias.double()).float()


def random_hidden(queries: int, keys: int) -> torch.Tensor:
    """`(batch, queries, keys)`: about half hidden, and the first query of the first row sees nothing."""
    hidden = torch.rand(BATCH, queries, keys) < 0.5
    hidden[0, 0] = True
    return hidden


def additive(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("name", FORMS)
class TestAgainstTheDefinition:
    @torch.no_grad()
    def test_self_attention(self, name):
        module = make_attention(**FORMS[name])
        states, hidden = torch.randn(BATCH, LENGTH, 12), random_hidden(LENGTH, LENGTH)
        output, _ = module(states, attention_mask=additive(hidden))
        assert_close(output, reference(module, states, states, hidden), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_cross_attention_to_states_of_another_width(self, name):
        module = make_attention(key_value_size=7, **FORMS[name])
        states, source = torch.randn(BATCH, LENGTH, 12), torch.randn(BATCH, SOURCE, 7)
        hidden = random_hidden(LENGTH, SOURCE)
        output, _ = module(states, source, attention_mask=additive(hidden))
        assert_close(output, reference(module, states, source, hidden), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_bias_joins_after_scale_and_cap(self, name):
        module = make_attention(**FORMS[name])
        states, hidden = torch.randn(BATCH, LENGTH, 12), random_hidden(LENGTH, LENGTH)
        bias = torch.randn(1, module.config.num_attention_heads, LENGTH, LENGTH)
        output, _ = module(states, attention_mask=additive(hidden), position_bias=bias)
        assert_close(output, reference(module, states, states, hidden, bias), rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_query_sum_to_one_without_sinks_and_to_less_with_them():
    states = torch.randn(BATCH, LENGTH, 12)
    for has_sinks in (False, True):
        _, weights = make_attention(attention_sinks=has_sinks)(states)
        totals = weights.sum(-1)
        assert (totals < 1).all() if has_sinks else torch.allclose(totals, torch.ones_like(totals))


@pytest.mark.parametrize("sinks", [None, torch.zeros(3)])
@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, float("-inf")])
def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients(mask, sinks):
    query, key, value = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    hidden = torch.full((1, 1, 2, 2), 0.0)
    hidden[..., 0, :] = mask
    output, weights = eager_attention(nn.Identity(), query, key, value, hidden, 0.5, s_aux=sinks)
    output.square().sum().backward()
    assert not output[:, 0].any()
    assert not weights[:, :, 0].any()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))
    assert not query.grad[:, :, 0].any()


def test_the_softmax_is_in_float32():
    query, key, value = (8 * torch.randn(1, 1, 6, 16) for _ in range(3))
    exact, _ = eager_attention(nn.Identity(), query.bfloat16().float(), key.bfloat16().float(), value, None, 1.0)
    low, weights = eager_attention(nn.Identity(), query.bfloat16(), key.bfloat16(), value.bfloat16(), None, 1.0)
    assert low.dtype == weights.dtype == torch.bfloat16
    assert (weights.float().sum(-1) - 1).abs().max() < 0.02
    assert low.isfinite().all() and exact.isfinite().all()


def test_a_cache_gives_the_keys_of_all_steps():
    module = make_attention(is_causal=True)
    states = torch.randn(BATCH, LENGTH, 12)
    causal = torch.ones(LENGTH, LENGTH).triu(1).bool().expand(BATCH, -1, -1)
    whole, _ = module(states, attention_mask=additive(causal))
    cache, steps = DynamicCache(), []
    for step in range(LENGTH):
        steps.append(module(states[:, step : step + 1], past_key_values=cache)[0])
    assert cache.get_seq_length() == LENGTH
    assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_cross_attention_projects_its_source_once():
    module = make_attention(key_value_size=12)
    states, source = torch.randn(BATCH, LENGTH, 12), torch.randn(BATCH, SOURCE, 12)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first, _ = module(states, source, past_key_values=cache)
    # Other states are not looked at again: what was projected at the first step is read back
    second, _ = module(states, torch.zeros_like(source), past_key_values=cache)
    assert_close(second, first)
    assert cache.cross_attention_cache.get_seq_length() == SOURCE


def test_a_rotation_turns_queries_and_keys_and_not_values():
    config = tiny("decoder", rope_parameters={"rope_type": "default", "rope_theta": 20.0})
    module = make_attention()
    states = torch.randn(1, LENGTH, 12)
    rotary = RotaryEmbedding(config, "full_attention")
    here = rotary(states, torch.arange(LENGTH)[None])
    there = rotary(states, torch.arange(LENGTH)[None] + 11)
    assert_close(module(states, rotation=here)[0], module(states, rotation=there)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(states, rotation=here)[0], module(states)[0], atol=1e-3)


def test_dropout_acts_in_training_alone():
    module = make_attention(attention_dropout=0.5)
    states = torch.randn(BATCH, LENGTH, 12)
    assert_close(module(states)[0], module(states)[0])
    module.train()
    assert not torch.allclose(module(states)[0], module(states)[0])
