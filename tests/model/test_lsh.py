"""Attention to keys that hash like the query, against a plain reference that goes token by token, and what follows from it."""

from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from variform.model import attention, masks
from variform.model.lsh import attend_in_chunks, hash_keys, rotations
from variform.model.patterns import parse
from variform.model.positions import count_positions, rotate

SPECS = [
    "lsh:4",
    "lsh:2,rounds=2",
    "lsh:2/4,rounds=3,seed=5",
    "lsh:4,chunked=true,chunk=4",
    "lsh:4,rounds=2,chunked=true,chunk=3",
    "lsh:2/4,rounds=3,chunked=true,chunk=5,seed=5",
    "lsh:4,rounds=2,chunked=true,chunk=20",
]
SORTED = [spec for spec in SPECS if "chunked" in spec]
FORMS = {
    "learned": {"position_embedding_type": "learned"},
    "rope": {"qk_norm": "head"},
    "grouped": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": ["q", "k"],
        "attention_scale": 0.7,
    },
    "alibi": {"position_embedding_type": "alibi"},
    "relative_bias": {"position_embedding_type": "relative_bias"},
}
# In blocks where chunks are sorted and nothing is added to the scores
ROUTES = ["eager", "sdpa", "blocks"]
FIRST_ROTATIONS = [0.5791300535202026, 0.9906340837478638, -0.5264312028884888, 0.9987345933914185]
BLOCKS = {"SHORTEST_FOR_BLOCKS": 1, "COST_OF_A_PLANNED_SCORE": 0}


def make(shape, spec, route="sdpa", auto_class=None, **fields):
    fields = {"num_hidden_layers": 1, "attention_patterns": [spec], "use_cache": "chunked" not in spec} | fields
    arguments = [] if auto_class is None else [auto_class]
    return build(tiny(shape, **fields), *arguments, attn_implementation="sdpa" if route == "blocks" else route)


def lowered_by(route):
    return mock.patch.multiple(masks, **BLOCKS) if route == "blocks" else nullcontext()


def plain_buckets(key, directions, factors):
    """The bucket of each token `(n, D)` in one round: which of the directions `(D, S)` and their opposites is nearest."""
    buckets = []
    for token in key.detach():
        bucket, total, first = 0, 1, 0
        for factor in factors:
            own = [float(token @ directions[:, first + number]) for number in range(factor // 2)]
            own += [-product for product in own]
            bucket, total, first = bucket + total * own.index(max(own)), total * factor, first + factor // 2
        buckets.append(bucket)
    return buckets


def plain_counts(buckets, pattern):
    """`[query][key]`: how often each key counts, without what is hidden from all patterns. buckets: `[round][token]`."""
    places = range(len(buckets[0]))
    if not pattern.chunked:
        return [Counter(k for k in places if any(own[k] == own[q] for own in buckets)) for q in places]
    rounds = [sorted(places, key=own.__getitem__) for own in buckets]
    rounds = [[order[i : i + pattern.chunk] for i in places[:: pattern.chunk]] for order in rounds]
    counts = [Counter() for _ in places]
    for before, chunks in zip([rounds[-1], *rounds[:-1]], rounds):
        for number, chunk in enumerate(chunks):
            for q in chunk:
                counts[q].update(chunk)
                if len(chunks) > 1:
                    counts[q].update(chunks[number - 1] if number > 0 else before[-1])
    return counts


def reference(module, states, real, is_causal, rotation, bias):
    """Softmax over what shares a bucket, one query of one head of one text at a time; the rounds' softmaxes summed."""
    pattern, heads, size = module.hashing, module.config.num_attention_heads, module.head_dim
    query = module.q_proj(states).unflatten(-1, (-1, size))
    query = (module.q_norm(query) if module.q_norm is not None else query).transpose(1, 2)
    query = query if rotation is None else rotate(query, *rotation)
    key = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = (
        module.v_proj(states).unflatten(-1, (-1, size)).transpose(1, 2).repeat_interleave(module.num_value_copies, 1)
    )
    directions = rotations(pattern, 0, heads, size)
    output = torch.zeros(*states.shape[:2], heads * size)
    for b in range(len(states)):
        text = real[b].nonzero().flatten()
        for h in range(heads):
            buckets = [
                plain_buckets(key[b, h, text], directions[h, :, r], pattern.factors) for r in range(pattern.rounds)
            ]
            for q, counts in enumerate(plain_counts(buckets, pattern)):
                seen = [k for k in counts if (k <= q or not is_causal)]
                seen = [k for k in seen if k != q] or [q]
                scores = (key[b, h, text[seen]] @ query[b, h, text[q]]) * module.scaling
                scores = scores + torch.tensor([float(counts[k]) for k in seen]).log()
                if bias is not None:
                    scores = scores + bias[min(b, len(bias) - 1), h, text[q], text[seen]]
                output[b, text[q], h * size : (h + 1) * size] = scores.softmax(-1) @ value[b, h, text[seen]]
    return module.o_proj(output)


def batch():
    """A padded text and one that fills its row."""
    ids, mask = pad(inputs(2, 11), 2, 1)
    mask[1] = 1
    return ids, mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_a_layer_is_its_plain_reference(shape, form):
    """Outputs and gradients of each route, padded on both sides."""
    ids, mask = batch()
    states, real = torch.randn(*ids.shape, 12, requires_grad=True), mask.bool()
    for spec in SPECS if form == "learned" else SPECS[1::3]:
        expected = None
        for route in ROUTES:
            model, caught = make(shape, spec, route, **FORMS[form]), {}
            module = model.layers[0].self_attn
            module.register_forward_pre_hook(lambda _, args, kw, caught=caught: caught.update(kw), with_kwargs=True)
            with lowered_by(route):
                model(ids, mask, use_cache=False)
            is_planned = not isinstance(caught["attention_mask"], torch.Tensor)
            assert is_planned == (route == "blocks" and spec in SORTED and model.position_bias is None)
            if expected is None:
                positions = count_positions(mask)
                bias = None if model.position_bias is None else model.position_bias(positions, positions).detach()
                plain = reference(module, states, real, shape == "decoder", caught["rotation"], bias)
                expected = with_gradients(plain[real], [states, *module.parameters()])
            found = with_gradients(module(states, **caught)[0][real], [states, *module.parameters()])
            for one, other in zip(found, expected, strict=True):
                assert_close(
                    one, other, rtol=1e-4, atol=1e-5, msg=lambda text, case=f"{spec}, {route}": f"{case}: {text}"
                )


def with_gradients(output, parameters):
    return [output, *torch.autograd.grad(output.cos().sum(), parameters)]


@torch.no_grad()
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("spec", SORTED)
def test_texts_of_a_batch_are_sorted_as_if_alone(spec, shape, route):
    """Ragged, padded on either side, and packed."""
    model, ids = make(shape, spec, route, num_hidden_layers=2), inputs(1, 23)
    with lowered_by(route):
        alone = [model(text)[0][0] for text in ids.split([12, 1, 10], dim=1)]
        positions = torch.cat([torch.arange(12), torch.arange(1), torch.arange(10)])[None]
        assert_close(model(ids, position_ids=positions)[0][0], torch.cat(alone), rtol=1e-4, atol=1e-5)
        rows, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
        for row, (start, text) in enumerate(zip((2, 0, 3), ids.split([12, 1, 10], dim=1))):
            rows[row, start : start + text.shape[1]] = text
            mask[row, start : start + text.shape[1]] = 1
        assert_close(model(rows, mask)[0][mask.bool()], torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_long_texts_take_the_chunks_on_their_own(monkeypatch):
    """Of two lengths; the same as the definition, with gradients."""
    calls = []
    monkeypatch.setattr(
        attention, "attend_in_chunks", lambda *args, **kw: calls.append(args) or attend_in_chunks(*args, **kw)
    )
    ids, mask = inputs(2, 400), torch.ones(2, 400, dtype=torch.long)
    mask[0, 370:] = 0
    for shape in ("encoder", "decoder"):
        outputs = []
        for route in ("eager", "sdpa"):
            model = make(shape, "lsh:8,rounds=2,chunked=true,chunk=16", route, max_position_embeddings=400)
            output = model(ids, mask)[0][mask.bool()]
            output.square().mean().backward()
            outputs.append([output, *(parameter.grad for parameter in model.parameters())])
        for found, expected in zip(*outputs):
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("form", [*FORMS, "transformer_xl", "window beside it"])
def test_a_cache_changes_nothing(form):
    """Token by token, in pieces, and with beams."""
    fields = FORMS.get(form, {"position_embedding_type": "transformer_xl"} if form == "transformer_xl" else {})
    patterns = ["lsh:4,rounds=2", "sliding_window:3"] if form == "window beside it" else ["lsh:2,rounds=2"]
    model = make(
        "decoder",
        patterns[0],
        auto_class=AutoModelForCausalLM,
        **fields,
        num_hidden_layers=2,
        attention_patterns=patterns,
    )
    ids, mask = batch()
    whole = model(ids, attention_mask=mask).logits
    for cuts in ([1] * 14, [5, 9]):
        cache, start, pieces = model.model.new_cache(), 0, []
        for size in cuts:
            end = start + size
            pieces.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
            start = end
        assert_close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)
    options = {"attention_mask": mask[:, :-1], "num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(ids[:, :-1], **options)
    assert torch.equal(found, model.generate(ids[:, :-1], use_cache=False, **options))


@torch.no_grad()
def test_a_text_read_in_pieces_with_a_memory_is_the_text_in_one():
    model = make("decoder", "lsh:2,rounds=2", memory_length=20, num_hidden_layers=2)
    ids, cache = inputs(2, 15), model.new_cache()
    pieces = [model(piece, past_key_values=cache)[0] for piece in ids.split([6, 1, 8], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sorted_texts_generate_without_a_cache():
    model = make("decoder", "lsh:4,chunked=true,chunk=4", auto_class=AutoModelForCausalLM)
    ids = inputs(1, 9)
    found = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for _ in range(4):
        ids = torch.cat((ids, model(ids).logits[:, -1:].index_fill(-1, torch.tensor([2]), -99).argmax(-1)), dim=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_a_cache_of_sorted_texts_is_refused(shape):
    model = make(shape, "lsh:4,chunked=true,chunk=4")
    with pytest.raises(
        ValueError, match=r"`past_key_values` is given, but `attention_patterns` sort .*`chunked=false`"
    ):
        model(inputs(), past_key_values=DynamicCache())


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_backends_without_tensor_masks_are_refused_by_name(backend):
    with pytest.raises(
        ValueError, match=f"`attn_implementation='{backend}'` cannot express `attention_patterns='lsh:4'`"
    ):
        make("encoder", "lsh:4", backend)


def test_what_is_no_tensor_is_refused_by_the_layer():
    module = make("decoder", "lsh:4").layers[0].self_attn
    with pytest.raises(ValueError, match=r"`attention_patterns` entry 'lsh:4' hides keys of a mask that is a tensor"):
        module(torch.randn(1, 5, 12))


@torch.no_grad()
def test_a_token_that_sees_no_other_sees_itself():
    """The first of a causal text; beside a sink it does so too."""
    for fields in ({}, {"attention_sinks": True}):
        model = make("decoder", "lsh:2", "eager", **fields)
        module = model.layers[0].self_attn
        _, weights = module(
            torch.randn(1, 5, 12),
            attention_mask=torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf),
        )
        assert (weights[0, :, 0, 1:] == 0).all() and (weights[0, :, 0, 0] > 0.01).all()
        assert fields != {} or (weights[0, :, 0, 0] == 1).all()


class TestHashes:
    def test_they_are_the_same_on_every_machine(self):
        found = rotations(parse("lsh:4"), 0, 1, 2).flatten()
        assert found.tolist() == FIRST_ROTATIONS

    def test_they_fill_the_open_interval_evenly(self):
        found = rotations(parse("lsh:64,rounds=2"), 1, 4, 32)
        assert found.abs().max() < 1
        assert abs(found.mean()) < 0.01 and abs(found.var() - 1 / 3) < 0.01
        flat = found.flatten()
        assert abs((flat[1:] * flat[:-1]).mean()) < 0.01

    def test_layers_seeds_rounds_and_heads_differ(self):
        one = rotations(parse("lsh:8,rounds=2"), 0, 2, 4)
        others = [rotations(parse("lsh:8,rounds=2"), 1, 2, 4), rotations(parse("lsh:8,rounds=2,seed=1"), 0, 2, 4)]
        others += [one.flip(2), one.flip(0)]
        assert all((one - other).abs().max() > 0.1 for other in others)

    def test_a_key_hashes_as_its_query_and_its_opposite_elsewhere(self):
        pattern, states = parse("lsh:2/8,rounds=3"), torch.randn(2, 3, 50, 8)
        buckets = hash_keys(states, pattern, 0)
        assert buckets.shape == (2, 3, 3, 50) and int(buckets.max()) == 15 and int(buckets.min()) == 0
        assert torch.equal(hash_keys(attention.as_key(states), pattern, 0), buckets)
        assert (hash_keys(-states, pattern, 0) != buckets).all()

    @torch.no_grad()
    def test_layers_that_share_weights_hash_by_their_own_numbers(self):
        hashed = []
        with mock.patch("variform.model.lsh.rotations", lambda *args: hashed.append(args[1]) or rotations(*args)):
            make("encoder", "lsh:4", num_hidden_layers=2, num_hidden_groups=1)(inputs())
        assert hashed == [0, 1]


def test_queries_and_keys_are_one_projection():
    model = make("decoder", "lsh:4", qk_norm="head", num_hidden_layers=2, attention_patterns=["lsh:4", "full"])
    names = [[name for name, _ in layer.self_attn.named_parameters()] for layer in model.layers]
    assert {"k_proj.weight", "k_norm.weight"} == {*names[1]} - {*names[0]}
    plan = model.config.base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] == plan["layers.*.self_attn.k_proj"] == "colwise_gather_output"
    assert "layers.*.self_attn.k_proj" not in make("decoder", "lsh:4").config.base_model_tp_plan
