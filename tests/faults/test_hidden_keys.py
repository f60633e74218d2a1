"""Queries that see no key: attention gives them 0, in every backend, and no NaN goes forward or backward."""

import pytest
import torch
from tiny import CONFIGS, build, inputs, pad, tiny
from torch.testing import assert_close

from variform.model import masks

# Heads of 16 channels, the fewest that flex_attention takes
WIDE = {"hidden_size": 16, "head_dim": 16}
# "blocks": the default backend, whose texts of any length take the block kernel
BACKENDS = ["eager", "sdpa", "flex_attention", "blocks"]
DIFFERENTIABLE = ["eager", "sdpa", "blocks"]  # torch has no backward of FlexAttention on a CPU
PATTERNS = {"full": ["full"], "sparse": ["sliding_window:2", "chunked:3"]}


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def model_of(monkeypatch):
    """Builds the same model for each backend."""

    def build_for(shape, backend, patterns):
        fields = {**WIDE, "attention_patterns": PATTERNS[patterns]}
        config = tiny(shape, **({"encoder": fields, "decoder": fields} if shape == "encoder_decoder" else fields))
        if backend == "blocks":
            monkeypatch.setattr(masks, "SHORTEST_FOR_BLOCKS", 1)
            monkeypatch.setattr(masks, "COST_OF_A_PLANNED_SCORE", 0)
            return build(config)
        monkeypatch.setattr(masks, "SHORTEST_FOR_BLOCKS", 10**9)
        return build(config, attn_implementation=backend)

    return build_for


def batch_of(shape, side):
    """Three rows, the second all padding, the others padded on one side by two; what a forward is given."""
    ids, mask = pad(inputs(3), *((2, 0) if side == "left" else (0, 2)))
    ids[1], mask[1] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    if shape == "encoder_decoder":
        given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return given


def attended(model, given):
    """What each attention, cross-attention too, hands to its output projection, and the output."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            handles.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    output = model(**given).last_hidden_state
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", CONFIGS)
class TestRowOfPadding:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gets_zeros_and_no_nan_goes_forward_or_backward(self, shape, side, patterns, backend, model_of):
        model, given = model_of(shape, backend, patterns), batch_of(shape, side)
        with torch.set_grad_enabled(backend in DIFFERENTIABLE):
            seen, output = attended(model, given)
        assert len(seen) == (6 if shape == "encoder_decoder" else 2)
        assert not any(part[1].any() for part in seen)
        assert all(part[[0, 2]].any() for part in seen)
        assert output.isfinite().all()
        if backend in DIFFERENTIABLE:
            output.square().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_is_the_same_in_every_backend_with_its_gradients(self, shape, side, patterns, model_of):
        given, found = batch_of(shape, side), {}
        defined = given["attention_mask"].bool()
        defined[1] = True  # the row of padding too
        for backend in BACKENDS:
            model = model_of(shape, backend, patterns)
            with torch.set_grad_enabled(backend in DIFFERENTIABLE):
                output = model(**given).last_hidden_state[defined]
            if backend in DIFFERENTIABLE:
                output.square().mean().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found[backend] = (output.detach(), gradients)
        for backend in BACKENDS[1:]:
            assert_close(found[backend][0], found["eager"][0], rtol=1e-4, atol=1e-5)
        for backend in DIFFERENTIABLE[1:]:
            assert found[backend][1].keys() == found["eager"][1].keys()
            for name, gradient in found["eager"][1].items():
                assert_close(found[backend][1][name], gradient, rtol=1e-3, atol=1e-5, msg=f"{backend} {name}")

    @pytest.mark.parametrize("backend", BACKENDS)
    @torch.no_grad()
    def test_leaves_the_other_rows_as_they_are_alone(self, shape, side, patterns, backend, model_of):
        model, given = model_of(shape, backend, patterns), batch_of(shape, side)
        others = {name: value[[0, 2]] for name, value in given.items()}
        real = others["attention_mask"].bool()
        found = model(**given).last_hidden_state[[0, 2]]
        assert_close(found[real], model(**others).last_hidden_state[real], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_a_query_whose_window_holds_padding_alone_gets_zeros(shape, side, backend, model_of):
    """The padding of a real text, further from it than any layer sees."""
    model = model_of(shape, backend, "sparse")
    ids, mask = pad(inputs(2), *((6, 0) if side == "left" else (0, 6)))
    mask[1] = 1
    beyond = slice(0, 2) if side == "left" else slice(-2, None)
    with torch.set_grad_enabled(backend in DIFFERENTIABLE):
        seen, output = attended(model, {"input_ids": ids, "attention_mask": mask})
    assert not any(part[0, beyond].any() for part in seen)
    assert all(part[mask.bool()].any(-1).all() for part in seen)
    assert output.isfinite().all()
    if backend in DIFFERENTIABLE:
        output.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@torch.no_grad()
def test_a_token_beside_padding_inside_its_text_sees_itself(shape, backend, model_of):
    model = model_of(shape, backend, "sparse")
    ids, mask = inputs(2), torch.ones(2, 7).long()
    mask[0, 2:5] = 0
    seen, output = attended(model, {"input_ids": ids, "attention_mask": mask})
    assert all(part[mask.bool()].any(-1).all() for part in seen)
    assert output.isfinite().all()
