"""Two processes compute what one computes: data, sharded-data and tensor parallelism through transformers' own plans.

Run as a script, this file is one of the two processes: `torchrun --nproc-per-node 2 test_distributed.py FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from tiny import build, inputs, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

# Two of each kind of head, and widths that two processes can share
EVEN = {"vocab_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
BIASED = {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True}
FORMS = {
    "plain": (AutoModelForCausalLM, tiny("decoder", **EVEN)),
    "untied_odd_vocabulary": (
        AutoModelForCausalLM,
        tiny("decoder", **{**EVEN, "vocab_size": 19}, tie_word_embeddings=False),
    ),
    "head_norm": (AutoModelForCausalLM, tiny("decoder", **EVEN, **BIASED, qk_norm="head", norm_placement="sandwich")),
    "full_norm": (AutoModelForCausalLM, tiny("decoder", **EVEN, qk_norm="full", norm_placement="reordered")),
    "sinks": (AutoModelForCausalLM, tiny("decoder", **EVEN, qk_norm="head", attention_sinks=True)),
    "alibi": (AutoModelForMaskedLM, tiny("encoder", **EVEN, position_embedding_type="alibi", gated_mlp=False)),
    "transformer_xl": (AutoModelForCausalLM, tiny("decoder", **EVEN, position_embedding_type="transformer_xl")),
    "lsh": (
        AutoModelForCausalLM,
        tiny(
            "decoder",
            **EVEN,
            attention_patterns=["lsh:4,rounds=2"],
            qk_norm="head",
            residual_streams=2,
            tie_word_embeddings=False,
        ),
    ),
    "shared_layers": (AutoModelForMaskedLM, tiny("encoder", **EVEN, num_hidden_groups=1, embedding_size=6)),
    "encoder_decoder": (
        AutoModelForSeq2SeqLM,
        tiny(
            "encoder_decoder",
            encoder={**EVEN, "position_embedding_type": "relative_bias", "relative_attention_num_buckets": 8},
            decoder={**EVEN, **BIASED, "position_embedding_type": "learned"},
        ),
    ),
}
# Data parallelism needs a gradient of every parameter in every step, whatever the step leaves out
DATA_FORMS = {
    "layerdrop": (AutoModelForCausalLM, tiny("decoder", **EVEN, layerdrop=0.5, type_vocab_size=2)),
    "plain": FORMS["plain"],
    "encoder_decoder": FORMS["encoder_decoder"],
}


def batch() -> dict[str, torch.Tensor]:
    input_ids = inputs(batch=4)
    labels = input_ids.masked_fill(torch.arange(7) < torch.tensor([0, 4, 2, 5])[:, None], -100)
    return {"input_ids": input_ids, "labels": labels}


def step(model, rows: slice = slice(None), share: int = 1) -> dict[str, torch.Tensor]:
    """Loss and gradients of some rows of the batch, divided by the tokens of all of them over `share` processes."""
    given = batch()
    tokens = (
        given["labels"][:, 1:] if "Causal" in type(getattr(model, "module", model)).__name__ else given["labels"]
    ) != -100
    loss = model(
        **{name: tensor[rows] for name, tensor in given.items()}, num_items_in_batch=tokens.sum() / share
    ).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def process(folder: Path) -> None:
    """What each of the two processes runs; the first writes the results."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    rows = slice(2 * rank, 2 * rank + 2)
    for name, (auto_class, _) in FORMS.items():
        sharding = DistributedConfig(tp_size=2)
        model = auto_class.from_pretrained(folder / name, distributed_config=sharding)
        results["tensor", name] = step(model.train())
        results["shards", name] = sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters()
        )
    for name, (auto_class, config) in DATA_FORMS.items():
        model = auto_class.from_pretrained(folder / name, distributed_config=DistributedConfig(fsdp_size=2))
        results["sharded data", name] = step(model.train(), rows, share=2)
        model = build(config, auto_class).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model = DistributedDataParallel(model)
        step(model, rows, share=2)
        model.zero_grad()
        results["data", name] = step(model, rows, share=2)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def run_two_processes(script: str, folder: Path) -> dict:
    """What two processes that run `script` on a folder leave there."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "match nothing" not in done.stderr, done.stderr[-6000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The results of the two processes, and of this one."""
    folder = tmp_path_factory.mktemp("distributed")
    expected = {}
    for name, (auto_class, config) in {**DATA_FORMS, **FORMS}.items():
        model = build(config, auto_class)
        model.save_pretrained(folder / name)
        expected[name] = step(model.train())
    return run_two_processes(__file__, folder), expected


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", FORMS)
def test_tensor_parallel_step_is_the_step_of_one_process(world, name):
    results, expected = world
    assert_same(results["tensor", name], expected[name])


@pytest.mark.parametrize("name", FORMS)
def test_tensor_parallelism_shares_the_weights_out(world, name):
    results, expected = world
    whole = sum(grad.numel() for name, grad in expected[name].items() if name != "loss")
    assert results["shards", name] < 0.7 * whole


@pytest.mark.parametrize("name", ["plain", "encoder_decoder"])
@pytest.mark.parametrize("kind", ["data", "sharded data"])
def test_data_parallel_step_is_the_step_of_one_process(world, kind, name):
    results, expected = world
    total = {**expected[name], "loss": results[kind, name]["loss"]}  # each process reports its own rows' loss
    assert_same(results[kind, name], total)


@pytest.mark.parametrize("kind", ["data", "sharded data"])
def test_a_dropped_layer_has_gradients_too(world, kind):
    results, _ = world
    assert all(grad is not None and torch.isfinite(grad).all() for grad in results[kind, "layerdrop"].values())


if __name__ == "__main__":
    process(Path(sys.argv[1]))
