"""The block kernel and its plans against `eager_attention` on dense masks, in float64, outputs and gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from variform.model import block_attention as kernel
from variform.model import block_plan
from variform.model.attention import eager_attention
from variform.model.block_attention import block_attention
from variform.model.block_plan import (
    BlockPlan,
    Rows,
    groups_of_text,
    make_plan,
    make_sorted_plan,
    planned_scores,
)
from variform.model.pattern_base import NARROW_TILE, Pattern, Text, Tile, pairs_of, split, union
from variform.model.patterns import parse

HEADS, SIZE, SCALING = 4, 8, 0.4
NAMES = ("query", "key", "value", "bias", "sinks")

BOTH_WAYS = [
    "full",
    "sliding_window:37",
    "sliding_window:150",
    "dilated:5,gap=3",
    "dilated:9,gap=1",
    "dilated:3,gap=1/2/1/5",
    "chunked:32",
    "chunked:130",
    "chunked:32,before=1",
    "chunked:7,before=2,cyclic=true",
    "local_global:11",
    "local_global:11,tokens=2",
    "strided:11",
    "strided:5,heads=split",
    "strided:11,heads=column",
    "fixed:16,summary=3",
    "fixed:7,summary=2,groups=3",
    "big_bird:8",
    "big_bird:13,random=1,seed=3",
    "big_bird:8,placement=first",
    "big_bird:200,random=0",
]
CASES = [(spec, is_causal) for spec in BOTH_WAYS for is_causal in (False, True)] + [("prefix_lm", True)]
SOME = ["sliding_window:37", "dilated:3,gap=1/2/1/5", "strided:5", "fixed:16,summary=3", "big_bird:8,placement=first"]
Texts = list[tuple[Text, int]]


def text_of(spec: str, length: int, is_causal: bool) -> Text:
    """A text with whatever the pattern looks at."""
    marked = tuple(place for place in (0, 3, 77, 129, 190) if place < length) if spec.startswith("local") else ()
    return Text(length, is_causal, marked, prefix=length // 3 if spec == "prefix_lm" else 0)


def dense_mask(pattern: Pattern, text: Text, num_heads: int = HEADS) -> torch.Tensor:
    """`(H, n, n)`, what is added to the scores: the logarithm of how often a key counts."""
    places = torch.arange(text.length)
    pairs = pairs_of(text, places[:, None], places[None, :])
    mask = torch.full((num_heads, text.length, text.length), -math.inf, dtype=torch.float64)
    for own, heads in pattern.by_head(num_heads).items():
        repeats = own.repeats(pairs)
        counts = own.visible(pairs) * (1 if repeats is None else repeats)
        mask[heads] = counts.double().log()
    return mask


def draw(num_rows: int, groups: int = HEADS, heads: int = HEADS, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Rows of queries, keys and values."""
    sizes = {"query": heads, "key": groups, "value": groups}
    states = {name: torch.randn(num_rows, size, SIZE).to(dtype) for name, size in sizes.items()}
    return {name: part.requires_grad_() for name, part in states.items()}


def reference(states, masks: list[tuple[int, torch.Tensor]], bias_index=None, bias=None, **options) -> torch.Tensor:
    """The definition in float64, one text at a time. masks: the first row of each text, and `(H, n, n)`."""
    query, key, value = (states[name].double() for name in NAMES[:3])
    output = torch.zeros_like(query)
    module = SimpleNamespace(training=False)
    for first, mask in masks:
        rows, places = slice(first, first + mask.shape[-1]), torch.arange(mask.shape[-1])
        own = (part[rows].transpose(0, 1)[None] for part in (query, key, value))
        if bias is not None:
            options["position_bias"] = bias.double()[None, :, bias_index(places[:, None], places[None, :])]
        finite = mask.clamp(min=torch.finfo(torch.float64).min)[None]
        output[rows] = eager_attention(module, *own, finite, SCALING, **options)[0][0]
    return output


def compare(states, output, expected, tolerance=1e-5):
    """Outputs, and the gradients of everything in `states`, for one random gradient of the output."""
    grad = torch.randn(output.shape).to(output.dtype)
    parts = list(states.values())
    found = torch.autograd.grad(output, parts, grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, parts, grad.double())
    assert output.dtype == states["query"].dtype
    for name, own, other in zip(("output", *states), (output, *found), (expected, *wanted)):
        scale = max(1.0, float(other.detach().abs().max()) if other.numel() else 0.0)
        assert_close(
            own.double() / scale,
            other.double() / scale,
            atol=tolerance,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(spec: str, texts: Texts, num_rows: int, *, groups=HEADS, dtype=torch.float32, tolerance=1e-5, **options):
    """The kernel equals the definition. options: of `block_attention`, and `bias_index`; tensors get gradients."""
    pattern = parse(spec)
    states = draw(num_rows, groups, dtype=dtype)
    bias_index = options.pop("bias_index", None)
    plan = make_plan(pattern, texts, num_heads=HEADS, bias_index=bias_index)
    states.update({name: options[name] for name in ("bias", "sinks") if name in options})
    output = block_attention(*(states[name] for name in NAMES[:3]), plan, scaling=SCALING, **options)
    if "sinks" in options:
        options["s_aux"] = options.pop("sinks")
    masks = [(first, dense_mask(pattern, text)) for text, first in texts]
    compare(states, output, reference(states, masks, bias_index, **options), tolerance)
    return plan


def visible_pairs(plan: BlockPlan) -> int:
    """Over all heads, as the masks of the plan's tiles count them."""
    total = 0
    for group in (group for groups in plan.rounds for group in groups):
        seen = torch.ones(1, 1, group.query.length, group.key.length) if group.mask is None else group.mask
        seen = seen if seen.dtype != torch.float32 or group.mask is None else seen > -math.inf
        tiles = group.query.tiles if len(seen) == 1 else 1
        total += int(seen.sum()) * tiles * len(range(HEADS)[group.heads])
    return total


@pytest.mark.parametrize("length", [1, 2, 15, 130, 207])
@pytest.mark.parametrize("spec, is_causal", CASES)
def test_a_pattern_is_computed_as_defined(spec, is_causal, length):
    text = text_of(spec, length, is_causal)
    plan = check(spec, [(text, 0)], length)
    assert visible_pairs(plan) == int((dense_mask(parse(spec), text) > -math.inf).sum())


@pytest.mark.parametrize("spec, is_causal", CASES)
def test_texts_of_any_length_lie_anywhere(spec, is_causal):
    """Padding before and after, documents end to end, equal texts and texts of one token."""
    texts, first = [], 5
    for length in (61, 1, 70, 61, 0, 61, 130):
        texts.append((text_of(spec, length, is_causal), first))
        first += length + (3 if length == 70 else 0)
    check(spec, texts, first + 4)


@given(data=st.data(), is_causal=st.booleans())
@settings(max_examples=40)
def test_random_patterns_over_random_texts(data, is_causal):
    number = st.integers(1, 40)
    gaps = st.lists(st.integers(1, 9), min_size=1, max_size=HEADS)
    specs = [
        number.map(lambda window: f"sliding_window:{window}"),
        st.builds(lambda window, gap: {"name": "dilated", "window": window, "gap": gap}, st.integers(1, 12), gaps),
        number.map(lambda size: f"chunked:{size + 1}"),
        st.builds("local_global:{},tokens={}".format, number, st.integers(0, 5)),
        st.builds("strided:{},heads={}".format, st.integers(2, 30), st.sampled_from(["merged", "split", "column"])),
        st.builds("fixed:{},summary={},groups={}".format, st.integers(8, 30), st.integers(1, 2), st.integers(1, 4)),
        st.builds("big_bird:{},random={},seed={}".format, number, st.integers(0, 4), number),
        st.builds("big_bird:{},random={},placement=first".format, number, st.integers(0, 4)),
    ]
    spec = data.draw(st.one_of(specs))
    texts, first = [], data.draw(st.integers(0, 3))
    for length in data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=4)):
        marked = tuple(sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=4)))) if length else ()
        texts.append((Text(length, is_causal, marked), first))
        first += length + data.draw(st.integers(0, 2))
    check(spec, texts, first, groups=data.draw(st.sampled_from([1, 2, 4])))


def test_nothing_is_attended_without_texts():
    states = draw(3)
    output = block_attention(*states.values(), make_plan(parse("strided:3"), [], num_heads=HEADS), scaling=SCALING)
    assert not output.any()
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), list(states.values())))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "spec", ["sliding_window:37", "strided:5,heads=split", "dilated:3,gap=1/2", "dilated:3,gap=1/2/2/3"]
)
def test_heads_share_keys(spec, groups):
    check(spec, [(Text(130, True), 0), (Text(75, True), 130)], 205, groups=groups)


def bucket(query_places, key_places):
    """Nine columns: distances near zero each have their own."""
    return (key_places - query_places).clamp(-4, 4) + 4


@pytest.mark.parametrize("spec, is_causal", CASES)
def test_a_bias_and_its_gradient(spec, is_causal):
    texts = [
        (text_of(spec, length, is_causal), first) for length, first in ((130, 2), (1, 132), (90, 133), (130, 223))
    ]
    bias = torch.randn(HEADS, 9, requires_grad=True)
    check(spec, texts, 353, bias=bias, bias_index=bucket, tolerance=2e-5)


def test_a_fixed_bias_keeps_the_fused_kernel(monkeypatch):
    """ALiBi: a slope a head."""
    monkeypatch.setattr(kernel, "go_back_explicitly", None)
    bias = torch.arange(130) * -torch.tensor([[0.5], [0.25], [0.125], [0.0]])
    pattern, text, states = parse("sliding_window:40"), Text(130, True), draw(130)

    def distance(query_places, key_places):
        return (query_places - key_places).abs()

    plan = make_plan(pattern, [(text, 0)], num_heads=HEADS, bias_index=distance)
    output = block_attention(*states.values(), plan, scaling=SCALING, bias=bias)
    compare(states, output, reference(states, [(0, dense_mask(pattern, text))], distance, bias))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("spec", SOME)
def test_scores_are_capped(spec, groups):
    check(spec, [(Text(130, True), 0), (Text(75, True), 130)], 205, groups=groups, softcap=0.7)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}])
@pytest.mark.parametrize("spec", SOME)
def test_sinks_take_part_in_the_softmax(spec, options):
    sinks = torch.randn(HEADS, requires_grad=True)
    check(spec, [(Text(130, True), 2), (Text(75, True), 132)], 210, sinks=sinks, **options)


def test_everything_at_once_in_float64():
    """The fused kernel misreads a mask of another dtype than the states'."""
    bias = torch.randn(HEADS, 9, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    texts = [(Text(60, True), 1), (Text(75, True), 62)]
    options = {"dtype": torch.float64, "bias_index": bucket, "bias": bias, "sinks": sinks, "tolerance": 1e-6}
    check("strided:5", texts, 140, groups=2, softcap=0.9, **options)
    check(
        "big_bird:8,placement=first",
        [(text._replace(is_causal=False), first) for text, first in texts],
        140,
        **options,
    )
    check("sliding_window:9", texts, 140, dtype=torch.float64, tolerance=1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("spec", SOME)
def test_half_precision(spec, dtype, tolerance, options):
    check(
        spec, [(Text(130, True), 0), (Text(75, True), 130)], 205, groups=2, dtype=dtype, tolerance=tolerance, **options
    )


@pytest.mark.parametrize("spec, is_causal", CASES)
def test_the_explicit_way_equals_the_fused_one(spec, is_causal, monkeypatch):
    monkeypatch.setattr(kernel, "is_fusible", lambda query, scoring: False)
    check(spec, [(text_of(spec, length, is_causal), first) for length, first in ((130, 3), (61, 133))], 200, groups=2)


def test_calls_of_one_tile(monkeypatch):
    monkeypatch.setattr(kernel, "ELEMENTS_ON_CPU", 1)
    for spec in SOME:
        check(spec, [(Text(207, True), 0)], 207)


def drop(plan, states, seed, **options):
    torch.manual_seed(seed)
    return block_attention(*states.values(), plan, scaling=SCALING, dropout=0.3, **options)


def test_dropout_drops_weights_and_scales_the_others():
    length, pattern, text = 40, parse("sliding_window:9"), Text(40, False)
    states = {**draw(length), "value": torch.eye(length)[:, None].repeat(1, HEADS, 1)}
    states["query"], states["key"] = (torch.randn(length, HEADS, length) for _ in range(2))
    plan = make_plan(pattern, [(text, 0)], num_heads=HEADS)
    weights = block_attention(*states.values(), plan, scaling=SCALING)
    dropped = drop(plan, states, 1)
    is_kept = dropped != 0
    assert_close(dropped[is_kept], weights[is_kept] / 0.7)
    assert abs(is_kept.sum() / (weights != 0).sum() - 0.7) < 0.05
    assert torch.equal(dropped, drop(plan, states, 1)) and not torch.equal(dropped, drop(plan, states, 2))


@pytest.mark.parametrize("spec", SOME)
def test_gradients_under_dropout(spec):
    """The same weights are dropped in both directions: finite differences hold."""
    states = draw(60, dtype=torch.float64)
    plan = make_plan(parse(spec), [(Text(60, True), 0)], num_heads=HEADS, bias_index=bucket)
    extra = {
        "bias": torch.randn(HEADS, 9).double().requires_grad_(),
        "sinks": torch.randn(HEADS).double().requires_grad_(),
    }

    def run(query, key, value, bias, sinks):
        return drop(plan, {"query": query, "key": key, "value": value}, 1, bias=bias, sinks=sinks, softcap=0.9)

    torch.autograd.gradcheck(run, (*states.values(), *extra.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_drops_the_same_weights(use_reentrant):
    states = draw(90)
    plan = make_plan(parse("strided:5"), [(Text(90, True), 0)], num_heads=HEADS)

    def run(query, key, value):
        return block_attention(query, key, value, plan, scaling=SCALING, dropout=0.3)

    torch.manual_seed(1)
    expected = run(*states.values())
    torch.manual_seed(1)
    output = checkpoint(run, *states.values(), use_reentrant=use_reentrant)
    grad = torch.randn(output.shape)
    assert torch.equal(output, expected)
    expected.backward(grad)
    wanted = [part.grad for part in states.values()]
    for part in states.values():
        part.grad = None
    output.backward(grad)
    assert all(torch.equal(part.grad, own) for part, own in zip(states.values(), wanted))


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}])
def test_autocast_computes_as_in_half_precision(options):
    plan = make_plan(parse("strided:5"), [(Text(90, True), 0)], num_heads=HEADS)
    states = draw(90)
    mixed = [states["query"], states["key"], states["value"].bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block_attention(*mixed, plan, scaling=SCALING, **options)
    expected = block_attention(*(part.bfloat16() for part in states.values()), plan, scaling=SCALING, **options)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(output.sum(), list(states.values()))
    wanted = torch.autograd.grad(expected.sum(), list(states.values()))
    assert all(torch.equal(own, other) for own, other in zip(grads, wanted))


def test_inputs_may_be_any_views():
    """What projections, rotations and expanded gradients give."""
    pattern, text = parse("dilated:5,gap=3"), Text(130, False)
    fused = torch.randn(130, 3, HEADS, 2 * SIZE, requires_grad=True)
    plan = make_plan(pattern, [(text, 0)], num_heads=HEADS)
    views = dict(zip(NAMES, fused[..., ::2].unbind(1)))
    output = block_attention(*views.values(), plan, scaling=SCALING)
    expected = reference(views, [(0, dense_mask(pattern, text))])
    own, other = (torch.autograd.grad(part.sum(), fused)[0] for part in (output, expected))
    assert_close(output.double(), expected, atol=1e-5, rtol=0)
    assert_close(own, other, atol=1e-5, rtol=0)


def test_a_plan_of_inference_is_remembered_for_training():
    groups_of_text.cache_clear()
    texts = [(Text(130, False), 0), (Text(61, False), 130)]
    for spec in ("big_bird:8,placement=first", "fixed:16,summary=3"):
        with torch.inference_mode():
            plan = make_plan(parse(spec), texts, num_heads=HEADS)
            block_attention(*(torch.randn(191, HEADS, SIZE) for _ in range(3)), plan, scaling=SCALING)
        bias = torch.randn(HEADS, 9, requires_grad=True)
        check(spec, texts, 191, bias=bias, bias_index=bucket)


def test_nothing_is_kept_without_gradients_and_no_gradient_of_a_gradient_is_promised():
    states = draw(20)
    plan = make_plan(parse("sliding_window:3"), [(Text(20, True), 0)], num_heads=HEADS)
    with torch.no_grad():
        assert not block_attention(*states.values(), plan, scaling=SCALING).requires_grad
    output = block_attention(*states.values(), plan, scaling=SCALING)
    (grad,) = torch.autograd.grad(output.square().sum(), states["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def chunk_tiles(length: int, chunk: int) -> list[Tile]:
    """A chunk sees itself and the one before, in a circle."""
    spans = list(split(0, length, chunk))
    return [Tile(span, union([span, spans[number - 1]])) for number, span in enumerate(spans)]


def counted_keys(orders: torch.Tensor, chunk: int) -> torch.Tensor:
    """`(S, n, n)`: in how many rounds a query's chunk or the one before it, in a circle, holds a key."""
    num_chunks = -(-orders.shape[-1] // chunk)
    chunks = orders.argsort(-1) // chunk
    distance = (chunks[..., :, None] - chunks[..., None, :]) % num_chunks
    return ((distance == 0) | (distance == 1)).sum(0)


@pytest.mark.parametrize("length", [1, 15, 16, 30, 70, 128])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("seen", ["others", "past", "real past"])
@pytest.mark.parametrize("rows_at_once", [1, 40, 4096])
def test_sorted_chunks(length, rounds, seen, rows_at_once, monkeypatch):
    """Reformer: each batch and head sorts its tokens in its own way, a number of times."""
    monkeypatch.setattr(block_plan, "SORTED_ROWS_ON_CPU", rows_at_once)
    num_sequences, chunk, places = 6, 16, torch.arange(length)
    orders = torch.rand(rounds, num_sequences, length).argsort(-1)
    real = torch.randint(1, length + 1, (num_sequences, 1))
    past = torch.minimum(places + 1, real) if seen == "real past" else (places + 1).expand(num_sequences, -1)
    plan = make_sorted_plan(orders, chunk_tiles(length, chunk), ends=None if seen == "others" else past)
    states = draw(num_sequences * length, 1, 1)
    output = block_attention(*states.values(), plan, scaling=SCALING)
    is_seen = places[:, None] != places if seen == "others" else places < past[..., None]
    masks = [
        (number * length, own.double().log()[None]) for number, own in enumerate(counted_keys(orders, chunk) * is_seen)
    ]
    compare(states, output, reference(states, masks))


def test_sorted_chunks_in_any_way():
    """Spelled out, with dropped weights, a cap and sinks, in half precision."""
    orders, length = torch.rand(2, 3, 50).argsort(-1), 50
    plan = make_sorted_plan(orders, chunk_tiles(length, 8))
    counts = counted_keys(orders, 8) * ~torch.eye(length, dtype=torch.bool)
    masks = [(number * length, own.double().log()[None]) for number, own in enumerate(counts)]
    sinks = torch.randn(1, requires_grad=True)
    states = {**draw(3 * length, 1, 1), "sinks": sinks}
    output = block_attention(*list(states.values())[:3], plan, scaling=SCALING, softcap=0.7, sinks=sinks)
    compare(states, output, reference(states, masks, softcap=0.7, s_aux=sinks))
    states = draw(3 * length, 1, 1, dtype=torch.bfloat16)
    compare(states, block_attention(*states.values(), plan, scaling=SCALING), reference(states, masks), tolerance=1e-2)
    states = draw(3 * length, 1, 1, dtype=torch.float64)

    def run(query, key, value):
        return drop(plan, {"query": query, "key": key, "value": value}, 1)

    torch.autograd.gradcheck(run, tuple(states.values()), fast_mode=True, atol=1e-4)


def test_tiles_inside_a_window_are_one_group_of_views():
    plan = make_plan(parse("sliding_window:128"), [(Text(4096, False), 0)], num_heads=HEADS)
    (groups,) = plan.rounds
    inside = max(groups, key=lambda group: group.query.tiles)
    assert inside.query.tiles == 4096 // NARROW_TILE - 4
    assert all(group.query.listed is None and group.key.listed is None for group in groups)
    states = torch.randn(4096, HEADS, SIZE)
    assert inside.key.take(states).untyped_storage().data_ptr() == states.untyped_storage().data_ptr()


@pytest.mark.parametrize("spec", ["dilated:64,gap=4", "strided:16,heads=column", "chunked:128", "full"])
def test_sorted_tiles_are_views_where_rows_are_regular(spec):
    texts = [(Text(512, False), first) for first in range(0, 2048, 512)]
    (groups,) = make_plan(parse(spec), texts, num_heads=HEADS).rounds
    assert all(group.query.listed is None and group.key.listed is None for group in groups)


def test_a_batch_of_equal_texts_is_planned_once():
    groups_of_text.cache_clear()
    make_plan(parse("big_bird:8"), [(Text(300, True), 300 * row) for row in range(16)], num_heads=HEADS)
    assert groups_of_text.cache_info().misses == 1


@pytest.mark.parametrize("spec, is_causal", CASES)
def test_planned_scores_are_what_a_plan_computes_at_most(spec, is_causal):
    text = text_of(spec, 207, is_causal)
    plan = make_plan(parse(spec), [(text, 0)], num_heads=HEADS)
    computed = sum(group.pairs() * len(range(HEADS)[group.heads]) for groups in plan.rounds for group in groups)
    planned = planned_scores(parse(spec), text, num_heads=HEADS)
    assert visible_pairs(plan) <= computed <= HEADS * planned
    if spec.startswith(("sliding", "chunked", "dilated")):
        assert computed == HEADS * planned


@given(
    count=st.integers(1, 12),
    length=st.integers(1, 12),
    start=st.integers(0, 5),
    step=st.integers(0, 14),
    stride=st.integers(1, 5),
    is_regular=st.booleans(),
)
def test_rows_are_read_and_added_to(count, length, start, step, stride, is_regular):
    numbers = start + torch.arange(count)[:, None] * step + torch.arange(length) * stride
    if not is_regular:
        numbers = torch.stack([torch.randperm(200)[:length] for _ in range(count)])
    rows, states = Rows.of(numbers), torch.randn(260, 3, 2)
    assert torch.equal(rows.numbers(), numbers)
    values = rows.take(states)
    assert torch.equal(values, states[numbers].transpose(1, 2))
    expected = torch.zeros_like(states).index_put_((numbers,), values.transpose(1, 2), accumulate=True)
    for pieces in ([(0, count)], [(0, count // 2), (count // 2, count)]):
        sums = torch.zeros_like(states)
        for first, end in pieces:
            if end > first:
                rows.cut(first, end).add(sums, values[first:end])
        assert_close(sums, expected)
    if numbers.unique().numel() == numbers.numel():
        written = torch.zeros_like(states)
        rows.put(written, values)
        assert_close(written, expected)
