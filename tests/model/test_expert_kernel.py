"""The CPU kernel of the experts beside the eager loop and transformers' implementations."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from variform.model import expert_kernel
from variform.model.expert_kernel import can_fuse, run_fused, sort_by_expert
from variform.model.moe import Experts

WIDTH, INNER = 24, 8  # grouped_mm wants rows of whole 16 bytes
REFERENCES = {
    "eager": Experts.run_eagerly,
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
}
NETWORKS = [
    {},
    {"gated_mlp": False, "hidden_act": "gelu"},
    {"mlp_bias": True},
    {"gated_mlp": False, "mlp_bias": True},
    {"mlp_bias": True, "hidden_act": "quick_gelu", "glu_limit": 0.5, "glu_offset": 1.0},
]


def make_experts(num_experts: int = 5, **fields) -> Experts:
    config = {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "hidden_act": "silu", "gated_mlp": True}
    config |= {"glu_limit": None, "glu_offset": 0.0, "mlp_bias": False, "activation_dropout": 0.0}
    config["_experts_implementation"] = "grouped_mm"
    experts = Experts(SimpleNamespace(num_experts=num_experts, **{**config, **fields}))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def route(num_tokens: int, num_experts: int, per_token: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, the distinct experts of each and their weights."""
    weights, chosen = torch.randn(num_tokens, num_experts).softmax(-1).topk(per_token)
    return torch.randn(num_tokens, WIDTH), chosen, weights


def output_and_gradients(run, experts: Experts, hidden, chosen, weights) -> dict[str, torch.Tensor]:
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    output = run(experts, hidden, chosen, weights)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    found = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden_states": hidden.grad, "weights": weights.grad, **found}


def check_equal(found: dict, expected: dict, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def differing(found: dict, expected: dict) -> float:
    """Largest distance, relative to the largest number of each tensor."""
    return max(
        float((found[name].double() - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network) or "gated")
@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_outputs_and_all_gradients_are_those_of_the_other_implementations(num_tokens, network, reference):
    """One token and two leave experts idle; 37 have uneven loads."""
    experts, routed = make_experts(**network), route(num_tokens, 5, 3)
    check_equal(
        output_and_gradients(run_fused, experts, *routed),
        output_and_gradients(REFERENCES[reference], experts, *routed),
    )


@pytest.mark.parametrize("network", [one for one in NETWORKS if one.get("gated_mlp", True)], ids="-".join)
def test_gates_of_large_matrices_are_products_of_their_own(network, monkeypatch):
    experts, routed = make_experts(**network), route(37, 5, 3)
    expected = output_and_gradients(run_fused, experts, *routed)
    one = products(lambda: run_fused(experts, *routed))
    monkeypatch.setattr(expert_kernel, "SMALL_MATRIX", 0)
    assert products(lambda: run_fused(experts, *routed)) > one
    check_equal(output_and_gradients(run_fused, experts, *routed), expected)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.sampled_from(NETWORKS), st.integers(0, 99))
@settings(max_examples=60)
def test_any_choice_of_experts_is_computed(num_tokens, num_experts, per_token, network, seed):
    """The same expert may be chosen twice, many may be idle."""
    torch.manual_seed(seed)
    experts = make_experts(num_experts, **network)
    chosen = torch.randint(num_experts, (num_tokens, per_token)).clamp(min=num_experts // 3)
    routed = torch.randn(num_tokens, WIDTH), chosen, torch.randn(num_tokens, per_token)
    check_equal(
        output_and_gradients(run_fused, experts, *routed),
        output_and_gradients(batched_mm_experts_forward, experts, *routed),
    )


def test_an_idle_expert_has_gradients_of_zero():
    """Not None, and not what the memory held before: the tests fill it with NaN."""
    experts, (hidden, _, weights) = make_experts(mlp_bias=True), route(6, 5, 2)
    chosen = torch.tensor([[1, 3]]).expand(6, 2)
    output_and_gradients(run_fused, experts, hidden, chosen, weights)
    for parameter in experts.parameters():
        assert_close(parameter.grad[[0, 2, 4]], torch.zeros_like(parameter.grad[[0, 2, 4]]), rtol=0, atol=0)
        assert parameter.grad[[1, 3]].abs().sum() > 0


def test_weights_of_zero_stop_outputs_and_not_their_own_gradient():
    """A token that its expert had no room for."""
    experts, (hidden, chosen, weights) = make_experts(), route(6, 5, 2)
    weights[::2] = 0.0
    found = output_and_gradients(run_fused, experts, hidden, chosen, weights)
    assert_close(found["output"][::2], torch.zeros(3, WIDTH), rtol=0, atol=0)
    assert (found["weights"][::2] != 0).all()
    check_equal(found, output_and_gradients(Experts.run_eagerly, experts, hidden, chosen, weights))


def test_widths_may_be_odd():
    experts, (_, chosen, weights) = make_experts(hidden_size=13, moe_intermediate_size=7), route(20, 5, 2)
    routed = torch.randn(20, 13), chosen, weights
    check_equal(
        output_and_gradients(run_fused, experts, *routed),
        output_and_gradients(Experts.run_eagerly, experts, *routed),
    )


def test_no_tokens_make_no_rows():
    experts = make_experts()
    hidden, chosen, weights = torch.randn(0, WIDTH), torch.zeros(0, 2, dtype=torch.long), torch.randn(0, 2)
    found = output_and_gradients(run_fused, experts, hidden, chosen, weights)
    assert found["output"].shape == (0, WIDTH)
    assert not found["gate_up_proj"].any() and not found["down_proj"].any()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network) or "gated")
def test_in_bfloat16_it_is_as_near_to_the_truth_as_grouped_mm(network):
    experts, routed = make_experts(**network), route(37, 5, 3)
    hidden, chosen, weights = routed[0].bfloat16(), routed[1], routed[2].bfloat16()
    half = make_experts(**network).to(torch.bfloat16)
    half.load_state_dict(experts.state_dict())
    exact = make_experts(**network).double()
    exact.load_state_dict(half.state_dict())
    truth = output_and_gradients(Experts.run_eagerly, exact, hidden.double(), chosen, weights.double())
    ours = output_and_gradients(run_fused, half, hidden, chosen, weights)
    theirs = output_and_gradients(grouped_mm_experts_forward, half, hidden, chosen, weights)
    assert ours["output"].dtype == ours["weights"].dtype == ours["down_proj"].dtype == torch.bfloat16
    assert differing(ours, truth) <= max(1.5 * differing(theirs, truth), 2**-7)


@pytest.mark.parametrize("is_inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast_computes_in_its_dtype_and_gradients_are_of_the_weights(is_inside):
    experts, (hidden, chosen, weights) = make_experts(mlp_bias=True), route(37, 5, 3)
    exact = output_and_gradients(Experts.run_eagerly, experts, hidden, chosen, weights)
    exact = {name: tensor.clone() for name, tensor in exact.items()}
    experts.zero_grad()
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    upstream = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        output = run_fused(experts, hidden, chosen, weights)
        if is_inside:
            output.backward(upstream.to(output.dtype))
    if not is_inside:
        output.backward(upstream.to(output.dtype))
    assert output.dtype == torch.bfloat16
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    found = {"output": output.detach(), "hidden_states": hidden.grad, "weights": weights.grad, **grads}
    assert all(tensor.dtype == torch.float32 for name, tensor in found.items() if name != "output")
    assert differing(found, exact) < 2**-5


def products(run) -> int:
    """How many matrix products a function makes, its backward included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


def test_frozen_weights_get_no_gradient_and_cost_no_product():
    """LoRA: the base is frozen, and what passes through it is not."""
    experts, routed = make_experts(), route(20, 5, 2)
    expected = output_and_gradients(run_fused, experts, *routed)
    trained = products(lambda: output_and_gradients(run_fused, experts, *routed))
    experts.zero_grad()
    experts.requires_grad_(False)
    frozen = products(lambda: output_and_gradients(run_fused, experts, *routed))
    found = output_and_gradients(run_fused, experts, *routed)
    assert found["gate_up_proj"] is None and found["down_proj"] is None
    for name in ("output", "hidden_states", "weights"):
        assert_close(found[name], expected[name])
    assert frozen < trained


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj", "hidden_states", "weights"])
def test_each_gradient_alone_is_the_one_among_all(trained):
    experts, (hidden, chosen, weights) = make_experts(), route(20, 5, 2)
    expected = output_and_gradients(run_fused, experts, hidden, chosen, weights)[trained]
    experts.requires_grad_(False)
    wanted = {"hidden_states": hidden, "weights": weights, **dict(experts.named_parameters())}[trained]
    wanted.requires_grad_()
    output = run_fused(experts, hidden, chosen, weights)
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output)
    assert_close(torch.autograd.grad(output, wanted, upstream)[0], expected)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network) or "gated")
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_without_gradients_it_is_the_same(num_tokens, network):
    """Decoding: one token goes a way of its own."""
    experts, routed = make_experts(**network), route(num_tokens, 5, 2)
    expected = run_fused(experts, *routed)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(run_fused(experts, *routed), expected.detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = run_fused(experts, *routed)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected.detach(), rtol=0.05, atol=0.05)


def test_one_token_touches_the_chosen_weights_alone():
    experts, (hidden, chosen, weights) = make_experts(mlp_bias=True), route(1, 5, 2)
    with torch.no_grad():
        expected = run_fused(experts, hidden, chosen, weights)
        is_idle = torch.ones(5, dtype=torch.bool).index_fill(0, chosen[0], False)
        for parameter in experts.parameters():
            parameter[is_idle] = float("nan")
        assert_close(run_fused(experts, hidden, chosen, weights), expected, rtol=0, atol=0)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrized_weights_pass_their_gradient_on():
    plain, experts, routed = make_experts(), make_experts(), route(20, 5, 2)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).copy_(getattr(plain, name) / 2)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(experts, name, Doubled())
    assert can_fuse(experts, routed[0])
    expected = output_and_gradients(run_fused, plain, *routed)
    found = output_and_gradients(run_fused, experts, *routed)
    assert_close(found["output"], expected["output"])
    for name in ("gate_up_proj", "down_proj"):
        assert_close(found[f"parametrizations.{name}.original"], 2 * expected[name])


def test_a_second_derivative_is_refused():
    experts, (hidden, chosen, weights) = make_experts(), route(20, 5, 2)
    hidden.requires_grad_()
    output = run_fused(experts, hidden, chosen, weights)
    (grad,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_dropout_inside_falls_on_what_the_experts_compute():
    experts, (hidden, chosen, weights) = make_experts(activation_dropout=0.5), route(20, 5, 2)
    calm = run_fused(experts.eval(), hidden, chosen, weights)
    assert_close(calm, Experts.run_eagerly(experts, hidden, chosen, weights), rtol=1e-5, atol=1e-5)
    experts.train()
    torch.manual_seed(1)
    first = run_fused(experts, hidden, chosen, weights)
    torch.manual_seed(1)
    assert_close(run_fused(experts, hidden, chosen, weights), first, rtol=0, atol=0)
    assert (run_fused(experts, hidden, chosen, weights) - first).abs().max() > 0.01


def test_inputs_need_not_be_contiguous():
    experts, (hidden, chosen, weights) = make_experts(), route(20, 5, 3)
    apart = hidden.t().contiguous().t(), chosen.t().contiguous().t(), weights.t().contiguous().t()
    assert not apart[0].is_contiguous()
    check_equal(
        output_and_gradients(run_fused, experts, *apart),
        output_and_gradients(run_fused, experts, hidden, chosen, weights),
    )


def test_a_number_without_an_expert_is_left_out_of_the_eager_loop():
    """Expert parallelism numbers the experts of other processes `num_experts`."""
    experts, (hidden, chosen, weights) = make_experts(), route(20, 6, 3)
    assert (chosen == 5).any()
    found = output_and_gradients(Experts.run_eagerly, experts, hidden, chosen, weights)
    silenced = weights * (chosen < 5)
    expected = output_and_gradients(Experts.run_eagerly, experts, hidden, chosen.clamp(max=4), silenced)
    expected["weights"] = expected["weights"] * (chosen < 5)
    check_equal(found, expected)


def test_the_assignments_are_sorted_by_expert_and_by_token():
    chosen = torch.tensor([[2, 0], [3, 2], [0, 4], [2, 5]])
    order, tokens, sizes = sort_by_expert(chosen, 5)
    assert sizes == [2, 0, 3, 1, 1]
    assert order.tolist() == [1, 4, 0, 3, 6, 2, 5]
    assert tokens.tolist() == [0, 2, 0, 1, 3, 1, 2]


def test_what_is_not_a_plain_matrix_on_a_cpu_goes_elsewhere():
    experts, hidden = make_experts(), torch.randn(2, WIDTH)
    assert can_fuse(experts, hidden)
    assert not can_fuse(experts, hidden.to("meta"))
    experts._is_expert_parallel = True
    assert not can_fuse(experts, hidden)
