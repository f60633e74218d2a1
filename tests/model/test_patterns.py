"""Patterns: each equals a plain definition pair by pair, and its plan covers just what it shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close

from variform.model.pattern_base import Full, Text, count_visible, pairs_of, visible_matrix
from variform.model.patterns import PATTERNS, parse

LENGTHS = [1, 2, 7, 16, 37, 64]


def within(window):
    """A window as `sliding_window` counts it: causal, with the query itself; else on each side."""
    return lambda q, k, n, causal: 0 <= q - k < window if causal else abs(q - k) <= window


def dilated(window, gap):
    def sees(q, k, n, causal):
        seen = (
            [q - gap * step for step in range(window)]
            if causal
            else range(q - gap * window, q + gap * window + 1, gap)
        )
        return k in seen

    return sees


def chunked_in_a_ring(size, before):
    """A chunk sees itself and those before it, where the first one comes after the last; causal, only its past."""

    def sees(q, k, n, causal):
        number, chunks = q // size, -(-n // size)
        seen = [number - step for step in range(before + 1)]
        return k // size in (seen if causal else [chunk % chunks for chunk in seen])

    return sees


def big_bird(block):
    def sees(q, k, n, causal):
        row, column, last = q // block, k // block, (n - 1) // block
        return abs(row - column) <= 1 or 0 in (row, column) or (not causal and last in (row, column))

    return sees


# The plain definition of each pattern, both ways; the future is hidden from causal queries below
PLAIN = {
    "full": lambda q, k, n, causal: True,
    "sliding_window:1": lambda q, k, n, causal: q == k if causal else abs(q - k) <= 1,
    "sliding_window:5": within(5),
    "dilated:3,gap=4": dilated(3, 4),
    "dilated:2,gap=1": dilated(2, 1),
    "chunked:6": lambda q, k, n, causal: q // 6 == k // 6,
    "chunked:6,before=2": lambda q, k, n, causal: 0 <= q // 6 - k // 6 <= 2,
    "chunked:6,before=1,cyclic=true": chunked_in_a_ring(6, 1),
    "chunked:5,before=3,cyclic=true": chunked_in_a_ring(5, 3),
    "local_global:4,tokens=2": lambda q, k, n, causal: within(4)(q, k, n, causal) or q < 2 or k < 2,
    "local_global:4": lambda q, k, n, causal: within(4)(q, k, n, causal),
    "strided:5": lambda q, k, n, causal: abs(q - k) < 5 or (q - k) % 5 == 0,
    "strided:5,heads=column": lambda q, k, n, causal: (q - k) % 5 == 0,
    "fixed:6,summary=2": lambda q, k, n, causal: q // 6 == k // 6 or k % 6 in (4, 5),
    "big_bird:4,random=0": big_bird(4),
    "big_bird:4,random=1,placement=first": lambda q, k, n, causal: n <= 28 or big_bird(4)(q, k, n, causal),
}


def plain_matrix(sees, length, is_causal):
    return torch.tensor(
        [
            [bool(sees(q, k, length, is_causal)) and (k <= q or not is_causal) for k in range(length)]
            for q in range(length)
        ]
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("spec", PLAIN)
def test_a_pattern_is_its_plain_definition(spec, is_causal):
    for length in LENGTHS:
        (pattern,) = parse(spec).by_head(3)
        expected = plain_matrix(PLAIN[spec], length, is_causal)
        assert_close(visible_matrix(pattern, Text(length, is_causal)), expected, msg=f"{length} tokens")


def published(mode, length, context, num_verts=1, vert_size=1, head=0):
    """The masks of openai/sparse_attention, token by token: `local`, `strided`, and `fixed` with blocks of one token."""
    matrix = torch.zeros(length, length, dtype=torch.bool)
    groups = torch.arange(context - 1, -1, -1).view(-1, vert_size)[:num_verts]
    for q in range(length):
        for k in range(q + 1):
            if mode == "local":
                matrix[q, k] = q - k <= min(length - 1, context - 1)
            elif mode == "strided":
                matrix[q, k] = (q - k) % context == 0
            else:
                is_own = k // context == q // context
                matrix[q, k] = is_own or k % context in groups[head % num_verts].tolist()
    return matrix


def test_sparse_transformers_masks_are_the_published_ones():
    """Local, strided and fixed attention, with one summary for all heads and with one a group of heads."""
    for length in LENGTHS:
        text = Text(length, is_causal=True)
        near, column = parse("strided:8,heads=split").by_head(2)
        assert_close(visible_matrix(near, text), published("local", length, 8))
        assert_close(visible_matrix(column, text), published("strided", length, 8))
        merged = visible_matrix(parse("strided:8"), text)
        assert_close(merged, published("local", length, 8) | published("strided", length, 8))
        for pattern, heads in parse("fixed:8,summary=2,groups=3").by_head(6).items():
            for head in heads:
                assert_close(visible_matrix(pattern, text), published("fixed", length, 8, 3, 2, head))


def test_a_dilated_layer_may_have_a_gap_a_head():
    heads = parse("dilated:2,gap=1/3").by_head(5)
    assert {str(pattern): own for pattern, own in heads.items()} == {
        "dilated:2,gap=1": [0, 2, 4],
        "dilated:2,gap=3": [1, 3],
    }


class TestBigBird:
    def rows(self, length, is_causal, layer=0, seed=0):
        pattern = parse(f"big_bird:2,random=2,seed={seed}").at_layer(layer)
        return visible_matrix(pattern, Text(length, is_causal))[::2, ::2]  # block by block

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_each_row_between_sees_as_many_random_blocks_as_the_field_says(self, is_causal):
        seen = self.rows(40, is_causal)
        fixed = visible_matrix(parse("big_bird:2,random=0"), Text(40, is_causal))[::2, ::2]
        drawn = (seen & ~fixed).sum(-1)
        assert drawn[6:-1].tolist() == [2] * 13
        assert drawn[0] == 0 and int(drawn.max()) == 2

    def test_a_causal_row_does_not_change_when_the_text_goes_on(self):
        assert_close(self.rows(60, True)[:20, :20], self.rows(40, True))

    def test_layers_and_seeds_draw_differently_and_a_second_time_the_same(self):
        draws = [self.rows(60, False, layer, seed) for layer, seed in ((0, 0), (1, 0), (0, 1))]
        assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        assert_close(self.rows(60, False), draws[0])

    def test_all_blocks_are_drawn_about_as_often(self):
        drawn = sum(self.rows(80, False, layer).int() for layer in range(200))[10, 1:9]  # of the blocks before row 10
        assert int(drawn.min()) > 0.4 * float(drawn.float().mean())


SPECS = [
    *PLAIN,
    "dilated:3,gap=1/2",
    "strided:4,heads=split",
    "fixed:5,summary=1,groups=2",
    "big_bird:3,random=2",
    "prefix_lm",
]


@st.composite
def texts(draw):
    length = draw(st.integers(1, 90))
    marked = draw(st.lists(st.integers(0, length - 1), max_size=4, unique=True))
    return Text(length, draw(st.booleans()), tuple(sorted(marked)), draw(st.integers(0, length)))


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20, deadline=None)
@given(text=texts())
def test_a_plan_covers_what_is_seen_and_every_query_once(spec, text):
    for pattern in parse(spec).at_layer(1).by_head(2):
        expected = visible_matrix(pattern, text).long()
        found = torch.zeros_like(expected)
        for part in pattern.parts(text.is_causal):
            order = part.order(text)
            order = torch.arange(text.length) if order is None else order
            queries = []
            for (first, end), ranges in part.tiles(text):
                queries += order[first:end].tolist()
                keys = torch.cat([order[a:b] for a, b in ranges])
                assert keys.unique().numel() == keys.numel()
                rows = order[first:end, None]
                found[rows, keys] += part.visible(pairs_of(text, rows, keys[None])).long()
            assert sorted(queries) == list(range(text.length))
        assert_close(found, expected)
    share = count_visible(parse(spec).at_layer(1), text, num_heads=2)
    heads = parse(spec).at_layer(1).by_head(2).items()
    assert share == sum(int(visible_matrix(pattern, text).sum()) * len(own) for pattern, own in heads) / 2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in ("full", "prefix_lm")])
def test_texts_are_seen_whole_up_to_the_length_that_is_said(spec, is_causal):
    pattern = parse(spec)

    def is_whole(length):
        text = Text(length, is_causal)
        return all(
            torch.equal(visible_matrix(own, text), visible_matrix(Full(), text))
            for layer in range(3)
            for own in pattern.at_layer(layer).by_head(2)
        )

    longest = int(pattern.longest_whole(is_causal))
    assert is_whole(longest) and not is_whole(longest + 1)


@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_of_the_last_keys_holds_all_that_later_queries_see(spec):
    for pattern in parse(spec).by_head(2):
        kept = parse(spec).retained(is_causal=True)
        if kept is not None:
            seen = visible_matrix(pattern, Text(64, is_causal=True))
            query, key = seen.nonzero().unbind(-1)
            assert int((query - key).max()) < kept


class TestEntries:
    @pytest.mark.parametrize("spec", SPECS)
    def test_strings_and_dicts_mean_the_same(self, spec):
        pattern = parse(spec)
        assert parse(pattern.to_dict()) == parse(str(pattern)) == pattern

    def test_every_pattern_is_known_by_its_name(self):
        assert {name for name, pattern in PATTERNS.items() if pattern.name != name} == set()

    def test_a_list_in_a_dict_is_a_list_in_a_string(self):
        as_dict = {"name": "dilated", "window": 2, "gap": [1, 2]}
        assert parse(as_dict) == parse("dilated:2,gap=1/2") and parse(as_dict).to_dict() == as_dict


# In the model: what a query may not see does not change its output, and what it may see does
MODEL_SPECS = [spec for spec in SPECS if "sliding_window:1" not in spec]


def is_legal(spec, shape):
    """Others are refused when the config is built: see test_config.py."""
    if shape == "encoder":
        return spec != "prefix_lm"
    return "first" not in spec and "cyclic" not in spec


@torch.no_grad()
@pytest.mark.parametrize("spec", MODEL_SPECS)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_layer_reads_what_its_pattern_shows(shape, spec, backend):
    """One layer: a change of token k reaches the output at q if and only if some head shows k to q."""
    if not is_legal(spec, shape):
        return
    length = 23
    config = tiny(shape, num_hidden_layers=1, attention_patterns=[spec], num_attention_heads=2)
    model = build(config, attn_implementation=backend)
    ids = inputs(1, length)
    marks = {"prefix_lengths": torch.tensor([5])} if spec == "prefix_lm" else {}
    expected = model(ids, **marks)[0]
    text = Text(length, shape == "decoder", prefix=5 if marks else 0)
    heads = config.pattern_of(0).by_head(2)
    seen = torch.stack([visible_matrix(pattern, text) for pattern in heads]).any(0)
    for key in range(0, length, 3):
        changed = ids.clone()
        changed[0, key] = 3 + (changed[0, key] - 2) % 16
        difference = (model(changed, **marks)[0] - expected).abs().amax(-1)[0] > 1e-6
        assert_close(difference, seen[:, key])


@torch.no_grad()
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("spec", [spec for spec in MODEL_SPECS if spec != "prefix_lm" and "first" not in spec])
def test_packed_documents_are_as_alone(shape, spec):
    if not is_legal(spec, shape):
        return
    model = build(tiny(shape, attention_patterns=[spec]))
    ids = inputs(1, 21)
    positions = torch.cat((torch.arange(9), torch.arange(12)))[None]
    packed = model(ids, position_ids=positions)[0]
    assert_close(packed[:, :9], model(ids[:, :9])[0], rtol=1e-4, atol=1e-5)
    assert_close(packed[:, 9:], model(ids[:, 9:])[0], rtol=1e-4, atol=1e-5)


class TestMarks:
    @torch.no_grad()
    @pytest.mark.parametrize("shape", ["encoder", "decoder"])
    def test_marked_tokens_see_and_are_seen_by_all(self, shape):
        spec = "local_global:2,tokens=1"
        model = build(tiny(shape, num_hidden_layers=1, attention_patterns=[spec]))
        ids, marks = inputs(2, 17), torch.zeros(2, 17, dtype=torch.long)
        marks[0, [6, 11]] = 1
        expected = model(ids, global_attention_mask=marks)[0]
        changed = ids.clone()
        changed[:, 6] = 3 + (changed[:, 6] - 2) % 16
        reached = (model(changed, global_attention_mask=marks)[0] - expected).abs().amax(-1) > 1e-6
        for row, marked in ((0, (6, 11)), (1, ())):
            text = Text(17, shape == "decoder", marked)
            assert_close(reached[row], visible_matrix(parse(spec), text)[:, 6])

    @torch.no_grad()
    def test_generated_tokens_are_not_global(self):
        from transformers import AutoModelForCausalLM

        model = build(tiny("decoder", attention_patterns=["local_global:2"]), AutoModelForCausalLM)
        ids, mask = pad(inputs(2, 9), 2)
        marks = torch.zeros_like(ids)
        marks[:, 4] = 1
        options = {"attention_mask": mask, "global_attention_mask": marks, "max_new_tokens": 6, "do_sample": False}
        found = model.generate(ids, **options)
        assert_close(model.generate(ids, use_cache=False, **options), found, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("shape", "spec", "name", "value"),
        [
            ("encoder", "local_global:2", "global_attention_mask", torch.ones(2, 5)),
            ("decoder", "prefix_lm", "prefix_lengths", torch.ones(2, 7)),
            ("decoder", "prefix_lm", "prefix_lengths", torch.tensor([2, 8])),
            ("encoder", "full", "global_attention_mask", torch.ones(2, 7)),
            ("decoder", "full", "prefix_lengths", torch.tensor([2, 2])),
        ],
    )
    def test_marks_that_do_not_fit_are_refused_by_name(self, shape, spec, name, value):
        model = build(tiny(shape, attention_patterns=[spec]))
        with pytest.raises(ValueError, match=f"`{name}"):
            model(inputs(), **{name: value})

    def test_global_projections_equal_a_plain_reference(self):
        """Global queries: softmax over all real tokens with the global projections; the others as without."""
        model = build(
            tiny("encoder", num_hidden_layers=1, attention_patterns=["local_global:2,global_projections=true"])
        )
        layer = model.layers[0]
        ids, mask = pad(inputs(2, 11), 0, 3)
        marks = torch.zeros_like(ids)
        marks[0, [0, 4]] = marks[1, 7] = 1
        caught = {}
        layer.self_attn.register_forward_pre_hook(lambda m, args, kw: caught.update(x=args[0], **kw), with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: caught.update(y=args[0]))
        model(ids, mask, global_attention_mask=marks)
        x, attention, rotation = caught["x"], layer.self_attn, caught["rotation"]
        from variform.model.positions import rotate

        query, key, value = (
            attention._heads(project(x), None)
            for project in (attention.q_proj_global, attention.k_proj_global, attention.v_proj_global)
        )
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        scores = query @ key.transpose(-1, -2) * attention.scaling
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        is_global = marks.bool()
        assert_close(caught["y"][is_global], expected[is_global], rtol=1e-5, atol=1e-5)
        caught["y"][is_global].sum().backward()
        assert attention.q_proj_global.weight.grad.abs().sum() > 0
