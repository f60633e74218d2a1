"""Numbers at their edges: float16 that overflows, experts that collapse or have no token, and the same loss compiled."""

import pytest
import torch
from tiny import CONFIGS, build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from variform.model.feed_forward import FeedForward
from variform.model.moe import Router
from variform.model.norms import saturate

SHAPES = list(CONFIGS)
LM = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def language_model(shape, **fields):
    both = {"encoder": fields, "decoder": fields}
    return build(tiny(shape, **(both if shape == "encoder_decoder" else fields)), LM[shape])


class TestFloat16:
    def test_saturation_is_of_float16_alone(self):
        beyond = torch.tensor([7e4, -7e4, 3.0])
        assert saturate(beyond) is beyond
        assert saturate(beyond.bfloat16()).max() > 65504
        assert saturate(beyond.half()).tolist() == [65504.0, -65504.0, 3.0]

    @pytest.mark.parametrize("gated", [True, False])
    def test_an_activation_of_70000_stays_finite(self, gated):
        """As T5's does: the inner product leaves the range of float16, and so does what is added to the stream."""
        network = FeedForward(tiny("encoder", gated_mlp=gated, hidden_act="relu", mlp_bias=True)).half()
        with torch.no_grad():
            for linear in (network.up_proj, network.gate_proj):
                if linear is not None:
                    linear.weight.zero_()
                    linear.bias.fill_(6e4)
                    linear.weight[:, 0] = 1e4
            network.down_proj.weight.copy_(torch.randn_like(network.down_proj.weight) * 1e-3)
        states = torch.ones(1, 2, 12).half()
        assert float(network.up_proj(states).max()) == float("inf")  # 7e4
        assert network(states).isfinite().all()

    @pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "reordered"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_feed_forward_times_ten_thousand_gives_finite_logits(self, shape, placement):
        form = {"norm_placement": placement, "position_embedding_type": "relative_bias", "hidden_act": "relu"}
        model = language_model(shape, **form, gated_mlp=False).half()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, FeedForward):
                    module.up_proj.weight.mul_(1e4)
                    module.down_proj.weight.mul_(1e4)
            extra = {"decoder_input_ids": inputs()} if shape == "encoder_decoder" else {}
            assert model(inputs(), **extra).logits.isfinite().all()


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


@pytest.mark.parametrize("router_type", ["softmax_topk", "switch", "sigmoid_bias"])
@pytest.mark.parametrize("shape", SHAPES)
class TestExperts:
    def model(self, shape, router_type):
        per_token = {"num_experts_per_tok": 1 if router_type == "switch" else 2}
        return language_model(shape, **{**EXPERTS, **per_token}, router_type=router_type).train()

    def test_one_that_takes_all_leaves_the_others_gradients_of_zero(self, shape, router_type):
        model, chosen = self.model(shape, router_type), []
        for router in routers(model):
            router.register_forward_hook(lambda _, args, output: chosen.append(output))
            with torch.no_grad():
                router.weight.zero_()  # all logits equal: the first are taken, whatever the tokens
        loss = model(inputs(), labels=inputs()).loss
        loss.backward()
        assert loss.isfinite()
        assert chosen
        idle = [name for name, p in model.named_parameters() if "experts." in name and not p.grad[-1].any()]
        assert idle
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_equal_scores_are_decided_the_same_every_time(self, shape, router_type):
        model = self.model(shape, router_type)
        for router in routers(model):
            torch.nn.init.zeros_(router.weight)
        losses = [model(inputs(), labels=inputs()).loss.item() for _ in range(3)]
        assert len(set(losses)) == 1

    def test_a_router_that_is_not_finite_gives_nan_and_no_crash(self, shape, router_type):
        """Which a run then stops at; no index leaves the table of experts."""
        model = self.model(shape, router_type)
        torch.nn.init.constant_(routers(model)[-1].weight, float("nan"))
        assert model(inputs(), labels=inputs()).loss.isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_has_no_part_in_the_balance_of_experts(shape):
    model = language_model(shape, **EXPERTS).train()
    ids, mask = pad(inputs(), 4)
    labels = ids.masked_fill(mask == 0, -100)
    found, alone = [], []
    for record, given, targets in ((alone, {}, inputs()), (found, {"attention_mask": mask}, labels)):
        words = {"input_ids": inputs() if record is alone else ids, **given}
        if shape == "encoder_decoder":
            words |= {"decoder_input_ids": inputs()}
            targets = inputs()
        record.append(model(**words, labels=targets).aux_loss)
    assert_close(found, alone)


MIXED = {**EXPERTS, "attention_patterns": ["sliding_window:3", "full"], "max_position_embeddings": 64}


class TestSameLoss:
    """Experts and sparse attention, checkpointed, compiled, and both: the loss and its gradients are those of plain torch."""

    def step(self, model, shape):
        model.zero_grad()
        ids, mask = pad(inputs(2, 9), 2)
        extra = {"decoder_attention_mask": torch.ones(2, 11)} if shape == "encoder_decoder" else {}
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **extra).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    def check(self, shape, prepare):
        model = language_model(shape, **MIXED).train()
        expected = self.step(model, shape)
        found = self.step(prepare(model), shape)
        assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        for name, gradient in expected[1].items():
            other = found[1].get(name, found[1].get(f"_orig_mod.{name}"))
            assert_close(other, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointed(self, shape, use_reentrant):
        def prepare(model):
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            return model

        self.check(shape, prepare)

    @pytest.mark.parametrize(
        ("shape", "checkpointed"),
        [
            pytest.param(
                shape, checkpointed, marks=() if (shape, checkpointed) == ("decoder", True) else pytest.mark.slow
            )
            for shape in SHAPES
            for checkpointed in (False, True)
        ],
    )
    def test_compiled(self, shape, checkpointed):
        def prepare(model):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.compiler.reset()
            return torch.compile(model, backend="aot_eager")

        self.check(shape, prepare)
