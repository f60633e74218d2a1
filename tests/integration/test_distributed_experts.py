"""Two processes compute what one computes with experts: slices of each, some of them whole, or shards of their weights.

Run as a script, this file is one of the two processes: `torchrun --nproc-per-node 2 test_distributed_experts.py FOLDER`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from test_distributed import EVEN, run_two_processes
from tiny import build, inputs, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from variform.model.moe import BiasedTokensChoose, MixtureOfExperts
from variform.model.pretrained import check_expert_parallelism

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
SPARSE = {**EVEN, **LOSSES, "num_experts": 6, "moe_intermediate_size": 12}
SHARED = {"num_shared_experts": 2, "shared_expert_gate": True}
GPT_OSS = {"router_bias": True, "glu_limit": 0.5, "glu_offset": 1.0}
FORMS = {
    "softmax": (
        AutoModelForCausalLM,
        tiny("decoder", **{**SPARSE, "num_experts": 16}, **SHARED, **GPT_OSS, mlp_layer_types=["dense", "sparse"]),
    ),
    "sigmoid": (AutoModelForCausalLM, tiny("decoder", **SPARSE, router_type="sigmoid_bias", mlp_bias=True)),
    "plain": (
        AutoModelForMaskedLM,
        tiny("encoder", **SPARSE, gated_mlp=False, mlp_bias=True, expert_capacity_factor=1.0),
    ),
    "expert_choice": (AutoModelForMaskedLM, tiny("encoder", **SPARSE, router_type="expert_choice")),
    "encoder_decoder": (
        AutoModelForSeq2SeqLM,
        tiny(
            "encoder_decoder",
            encoder={**EVEN, "moe_intermediate_size": 12, "num_experts": 2, "router_type": "switch"},
            decoder={
                **EVEN,
                "moe_intermediate_size": 12,
                "num_experts": 4,
                "gated_mlp": False,
                "router_type": "sigmoid_bias",
            },
            **LOSSES,
        ),
    ),
}
# Experts that are not shared out whole: one has no tensor of them all, one a width that torch's grouped product refuses
SLICED = {
    "odd_width": (AutoModelForCausalLM, tiny("decoder", **{**SPARSE, "moe_intermediate_size": 7}, mlp_bias=True)),
    "list_softmax": (
        AutoModelForCausalLM,
        tiny("decoder", **SPARSE, num_shared_experts=1, experts_layout="modulelist"),
    ),
    "list_sigmoid": (
        AutoModelForMaskedLM,
        tiny("encoder", **SPARSE, router_type="sigmoid_bias", experts_layout="modulelist", gated_mlp=False),
    ),
}
WAYS = {
    "tensor": {"tp_size": 2},
    "sharded data": {"fsdp_size": 2},
    "experts, one batch": {"tp_size": 2, "ep_size": 2},
    "experts, two batches": {"fsdp_size": 2, "ep_size": 2},
    # A token's experts elsewhere are masked by a number that no expert has
    "masked, grouped": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "masked, eager": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}
GENERATING = ("tensor", "experts, one batch")
CASES = [
    *[(way, name) for way in ("tensor", "sharded data") for name in {**FORMS, **SLICED}],
    *[(way, name) for way in ("experts, one batch", "experts, two batches") for name in FORMS],
    *[(way, name) for way in ("masked, grouped", "masked, eager") for name in ("sigmoid", "plain")],
    *[("data", name) for name in ("softmax", "list_softmax")],
]


def make(name: str):
    """A form whose biased routers leave the second process's experts without a token."""
    auto_class, config = {**FORMS, **SLICED}[name]
    model = build(config, auto_class)
    for module in model.modules():
        if isinstance(module, BiasedTokensChoose):
            module.e_score_correction_bias[module.num_experts // 2 :] = -10
    return model


def step(model, rows: slice = slice(None), share: int = 1) -> dict[str, torch.Tensor]:
    """As in test_distributed.py, of padded rows."""
    input_ids = inputs(batch=4)
    lengths = torch.tensor([7, 3, 5, 6])[:, None]
    mask = (torch.arange(7) < lengths).long()
    given = {"input_ids": input_ids, "labels": input_ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    shift = 1 if "Causal" in type(getattr(model, "module", model)).__name__ else 0
    tokens = (given["labels"][:, shift:] != -100).sum()
    loss = model(**{key: tensor[rows] for key, tensor in given.items()}, num_items_in_batch=tokens / share).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        found[key.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def generate(model) -> torch.Tensor:
    return model.eval().generate(inputs(), max_new_tokens=5, min_new_tokens=5, do_sample=False)


def process(folder: Path) -> None:
    """What each of the two processes runs; the first writes the results."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for way, name in CASES:
        if way == "data":
            model = make(name).train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model = DistributedDataParallel(model)
        else:
            auto_class = {**FORMS, **SLICED}[name][0]
            kernel = "eager" if way.endswith("eager") else None
            config = DistributedConfig(**WAYS[way])
            model = auto_class.from_pretrained(
                folder / name, distributed_config=config, experts_implementation=kernel
            ).train()
        if "tp_size" in WAYS.get(way, {}):
            found = step(model)
        else:
            found = step(model, slice(2 * rank, 2 * rank + 2), share=2)
            dist.all_reduce(found["loss"])
            found["loss"] /= 2
        results[way, name] = found
        if way in GENERATING and model.can_generate():
            results[way, name, "text"] = generate(model)
        if (way, name) == ("experts, one batch", "sigmoid"):
            model.save_pretrained(folder / "saved")
    for name, sizes in (("list_softmax", {"tp_size": 2, "ep_size": 2}), ("uneven", {"fsdp_size": 2, "ep_size": 2})):
        try:
            AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes))
        except ValueError as error:
            results["refused", name] = str(error)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The results of the two processes, and of this one."""
    folder = tmp_path_factory.mktemp("distributed_experts")
    build(tiny("decoder", **{**SPARSE, "num_experts": 3}), AutoModelForCausalLM).save_pretrained(folder / "uneven")
    expected = {}
    for name in {**FORMS, **SLICED}:
        model = make(name)
        model.save_pretrained(folder / name)
        loads = []
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.gate.register_forward_hook(lambda *call, seen=loads: seen.append(call[-1].load().sum(0)))
        expected[name] = step(model.train())
        expected[name, "loads"] = loads
        if model.can_generate():
            expected[name, "text"] = generate(model)
    return run_two_processes(__file__, folder), expected, folder


@pytest.mark.parametrize(("way", "name"), CASES)
def test_step_of_two_processes_is_the_step_of_one(world, way, name):
    found, expected = world[0][way, name], world[1][name]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        message = f"{key}: {{}}".format
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=message)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "encoder_decoder", "list_sigmoid"])
def test_the_loads_compared_are_uneven_and_leave_an_expert_idle(world, name):
    loads = world[1][name, "loads"]
    assert any(load.min() == 0 for load in loads)
    assert any(load[load > 0].unique().numel() > 1 for load in loads)


@pytest.mark.parametrize("way", GENERATING)
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "encoder_decoder"])
def test_generated_text_is_that_of_one_process(world, way, name):
    assert torch.equal(world[0][way, name, "text"], world[1][name, "text"])


def test_a_checkpoint_of_shared_out_experts_is_whole(world):
    folder = world[2]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for key, tensor in AutoModelForCausalLM.from_pretrained(folder / "sigmoid").state_dict().items():
        assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize(
    ("name", "words"),
    [("list_softmax", "`experts_layout='modulelist'`"), ("uneven", "does not divide `num_experts=3`")],
)
def test_expert_parallelism_that_cannot_be_is_refused(world, name, words):
    assert words in world[0]["refused", name]


def test_more_processes_than_experts_are_refused():
    from transformers.distributed import DistributedConfig

    with pytest.raises(
        ValueError, match=r"the 8 processes .* share out `num_experts=6`, and none may be left without"
    ):
        check_expert_parallelism(FORMS["sigmoid"][1], DistributedConfig(fsdp_size=4, tp_size=2, ep_size=2))


if __name__ == "__main__":
    process(Path(sys.argv[1]))
