"""Compiled models: the block kernel in one graph, without a mask, equal to the model as it is."""

import pytest
import torch
from functorch.compile import make_boxed_func
from test_masks import assert_same_gradients, gradients, marks_for
from tiny import build, inputs, tiny
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from variform.model import late_plan

LENGTH = 270
FORMS = {
    "window": ("encoder", {"attention_patterns": ["sliding_window:16"]}),
    "causal window, rope, grouped": (
        "decoder",
        {"attention_patterns": ["sliding_window:16"], "num_key_value_heads": 1},
    ),
    "two patterns, sinks, cap": (
        "decoder",
        {
            "attention_patterns": ["chunked:32", "strided:16"],
            "num_hidden_layers": 2,
            "attention_sinks": True,
            "attn_logit_softcapping": 0.5,
        },
    ),
    "heads that differ": (
        "decoder",
        {"attention_patterns": ["dilated:4,gap=1/2"], "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "random blocks that differ by layer": (
        "encoder",
        {"attention_patterns": ["big_bird:8,random=1"], "num_hidden_layers": 2},
    ),
    "counted blocks": ("encoder", {"attention_patterns": ["big_bird:8,random=2,placement=first"]}),
    "marked tokens": ("encoder", {"attention_patterns": ["local_global:8,tokens=1"]}),
    "relative bias": (
        "decoder",
        {"attention_patterns": ["fixed:16"], "position_embedding_type": "relative_bias"},
    ),
    "alibi": ("encoder", {"attention_patterns": ["sliding_window:16"], "position_embedding_type": "alibi"}),
}


class Seen:
    """A compiler that runs graphs as they are, and notes what they call and the largest tensor in them."""

    def __init__(self):
        self.calls, self.largest = [], 0
        self.backend = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)

    def note(self, module, example_inputs):
        for node in module.graph.nodes:
            self.calls.append(str(node.target))
            value = node.meta.get("val")
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(part, torch.Tensor):
                    self.largest = max(self.largest, int(part.numel()))
        return make_boxed_func(module.forward)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()


def form(name, **fields):
    shape, own = FORMS[name]
    return tiny(shape, **{"max_position_embeddings": 400, "num_hidden_layers": 1, **own, **fields})


def case(name, kind):
    """Arguments of a forward, and which outputs count."""
    ids, mask = inputs(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    arguments = {"input_ids": ids, **(marks_for("local_global", ids) if name == "marked tokens" else {})}
    if kind == "padded":
        mask[0, :5] = mask[0, -3:] = 0
        arguments["attention_mask"] = mask
    if kind == "padding inside":
        mask[1, 100:120] = 0
        arguments["attention_mask"] = mask
    if kind == "packed":
        arguments["position_ids"] = torch.cat((torch.arange(70), torch.arange(LENGTH - 70)))[None].expand(2, -1)
    return arguments, mask.bool()


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "padded") for name in FORMS), ("window", "plain"), ("relative bias", "packed")]
    + [(name, "padding inside") for name in ("heads that differ", "counted blocks")],
)
def test_a_compiled_model_computes_as_it_does_uncompiled(name, kind):
    model, (arguments, real), seen = build(form(name)), *[case(name, kind)], Seen()
    model.config.use_cache = False
    compiled = torch.compile(model, backend=seen.backend, fullgraph=True)
    results = []
    for run in (model, compiled):
        output = run(**arguments)[0][real]
        results.append((output.detach(), gradients(model, output)))
    assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])
    for operation in ("attend_in_blocks_1.default", "attend_in_blocks_1_backward.default"):
        assert f"variform.{operation}" in seen.calls
    assert seen.largest < LENGTH * LENGTH


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_compiled_step_drops_the_same_weights(is_checkpointed):
    model, (arguments, _) = build(form("relative bias", attention_dropout=0.3)).train(), case("relative bias", "plain")
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(5)
        output = run(**arguments, use_cache=False)[0]
        results.append((output.detach(), gradients(model, output)))
    assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


def test_autocast_reaches_the_kernel():
    model, (arguments, _) = build(form("two patterns, sinks, cap")), case("", "plain")
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = run(**arguments, use_cache=False)[0]
        results.append((output.detach(), gradients(model, output)))
    assert_close(results[1][0], results[0][0], rtol=0.02, atol=0.02)


def test_the_operation_keeps_what_torch_asks_of_one():
    states = [torch.randn(20, 2, 4, requires_grad=True) for _ in range(3)]
    texts = [torch.tensor([[0], [1]]), torch.tensor([[10], [7]]), None, None, None, None]
    texts[-1] = (torch.arange(10) - texts[0] >= 0) & (torch.arange(10) - texts[0] < texts[1])
    bias, sinks = torch.randn(2, 19, requires_grad=True), torch.randn(2, requires_grad=True)
    for extra in ((None, None), (bias, None), (None, sinks), (bias, sinks)):
        arguments = (*states, *extra, None, texts, 2, "strided:3", 0, True, 0.5, None, 0.0)
        torch.library.opcheck(late_plan.attend_operation, arguments)
