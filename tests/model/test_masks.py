"""Lowerings: every backend and the block kernel compute the same pattern, and each route is taken where it should be."""

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from variform.model import masks

SPECS = [
    "sliding_window:3",
    "dilated:2,gap=3",
    "dilated:2,gap=1/2",
    "chunked:4",
    "local_global:2,tokens=1",
    "local_global:2,global_projections=true",
    "strided:3",
    "strided:3,heads=split",
    "fixed:4",
    "fixed:4,summary=1,groups=3",
    "big_bird:2,random=1",
    "big_bird:1,random=1,placement=first",
    "prefix_lm",
]
FORMS = [
    (shape, spec)
    for spec in SPECS
    for shape in ("encoder", "decoder")
    if not (shape == "decoder" and ("first" in spec or "projections" in spec))
    and not (shape == "encoder" and spec == "prefix_lm")
]
LENGTH = 19


@pytest.fixture
def made(monkeypatch):
    """The plans that a test makes, as (pattern, texts)."""
    plans, make = [], masks.make_plan

    def record(pattern, texts, **kwargs):
        plans.append((str(pattern), texts))
        return make(pattern, texts, **kwargs)

    monkeypatch.setattr(masks, "make_plan", record)
    return plans


@pytest.fixture
def blocks(monkeypatch, made):
    """The block kernel for texts of any length, at any cost."""
    monkeypatch.setattr(masks, "SHORTEST_FOR_BLOCKS", 1)
    monkeypatch.setattr(masks, "COST_OF_A_PLANNED_SCORE", 0)
    return made


def marks_for(spec: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a caller may say beside the text, for patterns that read it."""
    if "local_global" in spec:
        marks = torch.zeros_like(ids)
        marks[0, [4, 9]] = marks[1, 2] = 1
        return {"global_attention_mask": marks}
    return {"prefix_lengths": torch.tensor([3, 7])} if spec == "prefix_lm" else {}


def gradients(model, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("scheme", ["none", "rope", "learned", "sinusoidal", "alibi", "relative_bias"])
@pytest.mark.parametrize(("shape", "spec"), FORMS)
def test_the_block_kernel_equals_eager(shape, spec, scheme, blocks):
    """With padding on both sides of one row and none in the other: outputs and gradients."""
    config = tiny(shape, attention_patterns=[spec], position_embedding_type=scheme, num_attention_heads=4)
    ids, mask = pad(inputs(2, LENGTH), 2, 3)
    mask[1] = 1
    results = []
    for backend in ("eager", "sdpa"):
        model = build(config, attn_implementation=backend)
        output = model(ids, mask, **marks_for(spec, ids))[0][mask.bool()]
        results.append((output.detach(), gradients(model, output)))
    assert len(blocks) > 0
    assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


# What sdpa cannot express
SPELLED_OUT = {
    "cap": {"attn_logit_softcapping": 0.5},
    "sinks": {"attention_sinks": True, "num_key_value_heads": 2, "head_dim": 4},
    "both": {"attn_logit_softcapping": 0.5, "attention_sinks": True, "position_embedding_type": "relative_bias"},
}


@pytest.mark.parametrize("name", SPELLED_OUT)
@pytest.mark.parametrize(("shape", "spec"), FORMS)
def test_forms_that_sdpa_cannot_express_take_the_kernel_by_default(shape, spec, name, blocks):
    """Padded on both sides: outputs and gradients."""
    ids, mask = pad(inputs(2, LENGTH), 2, 3)
    mask[1] = 1
    results = []
    for options in ({"attn_implementation": "eager"}, {}):
        model = build(tiny(shape, attention_patterns=[spec], num_attention_heads=4, **SPELLED_OUT[name]), **options)
        output = model(ids, mask, **marks_for(spec, ids))[0][mask.bool()]
        results.append((output.detach(), gradients(model, output)))
        assert (len(blocks) > 0) == (options == {})
    assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


@torch.no_grad()
@pytest.mark.parametrize("name", SPELLED_OUT)
@pytest.mark.parametrize("spec", ["sliding_window:3", "strided:3", "full"])
def test_packed_documents_in_forms_that_sdpa_cannot_express(spec, name, blocks):
    model = build(tiny("decoder", attention_patterns=[spec], num_attention_heads=4, **SPELLED_OUT[name]))
    ids = inputs(1, LENGTH)
    positions = torch.cat((torch.arange(8), torch.arange(LENGTH - 8)))[None]
    packed = model(ids, position_ids=positions)[0]
    assert [text.length for text, _ in blocks[0][1]] == [8, LENGTH - 8]
    for part in (slice(0, 8), slice(8, LENGTH)):
        assert_close(packed[:, part], model(ids[:, part])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["rope", "relative_bias"])
@pytest.mark.parametrize(("shape", "spec"), [form for form in FORMS if form[1] != "prefix_lm"])
def test_packed_documents_by_blocks_are_as_alone(shape, spec, scheme, blocks):
    fields = {"num_key_value_heads": 1, "attention_patterns": [spec]}
    model = build(tiny(shape, position_embedding_type=scheme, **fields), attn_implementation="sdpa")
    ids = inputs(1, LENGTH)
    positions = torch.cat((torch.arange(8), torch.arange(1), torch.arange(LENGTH - 9)))[None]
    packed = model(ids, position_ids=positions)[0]
    assert [text.length for text, _ in blocks[0][1]] == [8, 1, LENGTH - 9]
    for start, end in ((0, 8), (8, 9), (9, LENGTH)):
        assert_close(packed[:, start:end], model(ids[:, start:end])[0], rtol=1e-4, atol=1e-5)


FLEX_SPECS = [spec for spec in SPECS if "first" not in spec]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("shape", "spec"), [form for form in FORMS if form[1] in FLEX_SPECS])
def test_flex_attention_equals_eager(shape, spec):
    config = tiny(shape, attention_patterns=[spec], hidden_size=16, head_dim=16, num_hidden_layers=1)
    ids, mask = pad(inputs(2, LENGTH), 2, 0)
    mask[1] = 1
    with torch.compiler.set_stance("force_eager"):
        eager, flex = (
            build(config, attn_implementation=backend)(ids, mask, **marks_for(spec, ids))[0][mask.bool()]
            for backend in ("eager", "flex_attention")
        )
    assert_close(flex, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ("encoder", "strided:3"),
        ("decoder", "dilated:2,gap=1/2"),
        ("encoder", "local_global:2,global_projections=true"),
    ],
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(shape, spec, use_reentrant, sinks, blocks):
    """With dropout: what is computed again drops the same weights."""
    fields = {"attention_dropout": 0.3, "position_embedding_type": "relative_bias", "attention_sinks": sinks}
    model = build(tiny(shape, attention_patterns=[spec], **fields)).train()
    ids, results = inputs(2, LENGTH), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        output = model(ids)[0]
        results.append((output.detach(), gradients(model, output)))
    assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert_same_gradients(results[1][1], results[0][1])


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", ["sliding_window:16", "chunked:32", "local_global:16,tokens=2", "big_bird:16,random=1"]
)
@pytest.mark.parametrize("scheme", ["rope", "alibi"])
def test_a_long_prompt_and_then_token_by_token(spec, scheme, made):
    """The first call by blocks, the rest through a cache: as the whole text at once, and as eager."""
    config = tiny(
        "decoder", attention_patterns=[spec], position_embedding_type=scheme, max_position_embeddings=400, head_dim=8
    )
    model = build(config, AutoModelForCausalLM, attn_implementation="sdpa")
    ids, mask = pad(inputs(2, 310), 6)
    mask[1] = 1
    whole = model(ids, mask).logits
    cache, pieces = None, []
    for start, end in ((0, 300), (300, 309), *((n, n + 1) for n in range(309, 316))):
        output = model(ids[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert made
    real = mask.bool()
    assert_close(torch.cat(pieces, dim=1)[real], whole[real], rtol=1e-4, atol=1e-4)
    eager = build(config, AutoModelForCausalLM, attn_implementation="eager")
    assert_close(eager(ids, mask).logits[real], whole[real], rtol=1e-4, atol=1e-4)
    kept = {layer.keys.shape[2] for layer in cache.layers}
    window = config.sliding_window
    assert kept == ({316} if window is None else {window - 1})


class TestRoutes:
    def run(self, spec, length=300, backend="sdpa", shape="encoder", **kwargs):
        config = tiny(shape, attention_patterns=[spec], max_position_embeddings=600, num_hidden_layers=1)
        model = build(config, attn_implementation=backend)
        with torch.no_grad():
            return model, model(inputs(1, length), **kwargs)[0]

    def test_a_long_text_takes_the_kernel_by_itself(self, made):
        self.run("sliding_window:16")
        assert [pattern for pattern, _ in made] == ["sliding_window:16"]

    @torch.no_grad()
    @pytest.mark.parametrize("name", SPELLED_OUT)
    def test_a_long_text_takes_the_kernel_by_itself_where_sdpa_cannot_express_the_form(self, name, made):
        fields = {"max_position_embeddings": 600, "num_attention_heads": 4, **SPELLED_OUT[name]}
        model = build(tiny("decoder", attention_patterns=["sliding_window:16"], **fields))
        output = model(inputs(1, 300), use_cache=False)[0]
        assert len(made) == 1
        model.set_attn_implementation("eager")
        assert_close(output, model(inputs(1, 300), use_cache=False)[0], rtol=1e-4, atol=1e-5)
        assert len(made) == 1

    @pytest.mark.parametrize("shape", ["encoder", "decoder"])
    @pytest.mark.parametrize("spec", ["sliding_window:300", "chunked:300", "strided:300", "fixed:300", "big_bird:100"])
    def test_a_text_that_is_seen_whole_runs_the_code_of_full_attention(self, spec, shape, made, monkeypatch):
        """No plan, no mask, and bit by bit the output of `full`."""
        given, sdpa = [], masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(
            masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda **kw: given.append(sdpa(**kw))
        )
        _, output = self.run(spec, shape=shape)
        _, expected = self.run("full", shape=shape)
        assert given == [None, None] and not made
        assert_close(output, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("spec", "options"),
        [
            ("sliding_window:16", {"length": 24}),  # too short to pay
            ("sliding_window:16", {"backend": "eager"}),  # the definition
            ("chunked:290", {}),  # hides next to nothing
            ("full", {}),
        ],
    )
    def test_where_it_does_not_pay_a_mask_is_made(self, spec, options, made):
        self.run(spec, **options)
        assert not made

    def test_packed_documents_take_the_kernel_under_full_attention(self, made):
        positions = torch.arange(300)[None] % 30
        self.run("full", position_ids=positions)
        assert len(made[0][1]) == 10

    def test_padding_inside_a_text_takes_a_mask(self, made):
        mask = torch.ones(1, 300, dtype=torch.long)
        mask[0, 150] = 0
        self.run("sliding_window:16", attention_mask=mask)
        assert not made

    @pytest.mark.parametrize("spec", ["sliding_window:16", "big_bird:16,random=1", "fixed:16,groups=3"])
    @pytest.mark.parametrize("shape", ["encoder", "decoder"])
    def test_an_exported_model_is_the_model(self, spec, shape):
        model, expected = self.run(spec, shape=shape)
        model.config.use_cache = False
        program = torch.export.export(model, (), {"input_ids": inputs(1, 300)})
        assert_close(program.module()(input_ids=inputs(1, 300))[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("spec", ["sliding_window:16", "local_global:16,tokens=1"])
    def test_a_compiled_model_is_the_model(self, spec):
        model, expected = self.run(spec)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert_close(compiled(inputs(1, 300))[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_stacks_of_a_pair_have_patterns_of_their_own(blocks):
    sides = {"encoder": {"attention_patterns": ["big_bird:2"]}, "decoder": {"attention_patterns": ["strided:3"]}}
    ids, mask = pad(inputs(2, LENGTH), 0, 4)
    mask[1] = 1
    results = []
    for backend in ("eager", "sdpa"):
        model = build(tiny("encoder_decoder", **sides), AutoModelForSeq2SeqLM, attn_implementation=backend)
        results.append(model(ids, mask, labels=inputs(2, 15)).logits)
    assert {pattern.split(":")[0] for pattern, _ in blocks} == {"big_bird", "strided"}
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_a_backend_that_cannot_express_a_pattern_is_refused_by_field(backend):
    spec = "big_bird:4,placement=first"
    model = build(tiny("encoder", attention_patterns=[spec]))
    with pytest.raises(
        ValueError, match=f"`attn_implementation='{backend}'` cannot express `attention_patterns='{spec}'`"
    ):
        model.set_attn_implementation(backend)
