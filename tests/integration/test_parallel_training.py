"""Training in two processes is training in one: data parallelism through Trainer, sharded weights through a plain loop."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from tiny import build, inputs, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, get_scheduler

import variform
from variform.report.plan import plan
from variform.training.parallel import Recipe, clip, numbers_of, stack, to_one_process

CHILDREN = Path(__file__).parents[1] / "training" / "children"
EVEN = {"vocab_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.1}
FORMS = {
    "dense": tiny("decoder", **EVEN, hidden_dropout=0.0),
    "experts": tiny("decoder", **EVEN, **EXPERTS, router_z_loss_coef=0.1),
    "pair": tiny("encoder_decoder", encoder=EVEN, decoder=EVEN),
}
HEADS = {"dense": AutoModelForCausalLM, "experts": AutoModelForCausalLM, "pair": AutoModelForSeq2SeqLM}
WAYS = ["fsdp2/dense", "tp/dense", "ep/experts"]
MORE_WAYS = ["fsdp2/experts", "tp/experts", "fsdp2/pair", "tp/pair"]


def run(script: str, *arguments: str, processes: int = 2) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launcher if processes > 1 else []), str(CHILDREN / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Of one length, with labels that are more in some than in others."""
    ids = inputs(count, 7)
    hidden = torch.arange(7) < torch.arange(count)[:, None] % 5
    return [{"input_ids": own, "labels": labels} for own, labels in zip(ids, ids.masked_fill(hidden, -100))]


def lay_out(folder: Path) -> Path:
    torch.save(examples(), folder / "data.pt")
    for name, config in FORMS.items():
        build(config, HEADS[name]).save_pretrained(folder / name)
    return folder


def train_alone(folder: Path, form: str) -> tuple[list[float], torch.nn.Module]:
    """The same steps in this process."""
    recipe, data, losses = Recipe("fsdp2", steps=4, batch_size=4, max_grad_norm=0.5), examples(), []
    model = HEADS[form].from_pretrained(folder / form).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 0, recipe.steps)
    for step in range(recipe.steps):
        loss = model(**stack([data[number] for number in numbers_of(step, len(data), recipe)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, model


class World:
    """What two processes left, in a folder."""

    def __init__(self, folder: Path, ways: list[str]):
        self.folder = lay_out(folder)
        run("parallel_steps.py", str(folder), *ways)
        self.results = json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("sharded"), WAYS)


@pytest.fixture(scope="module")
def slow_world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("sharded_more"), MORE_WAYS)


@pytest.fixture
def of_way(request, way):
    world = request.getfixturevalue("world" if way in WAYS else "slow_world")
    return world.folder, world.results[way], world


EACH_WAY = pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)])


@EACH_WAY
def test_losses_and_weights_are_those_of_one_process(of_way, way, tmp_path):
    folder, found, _ = of_way
    losses, alone = train_alone(folder, way.split("/")[1])
    assert found["losses"] == pytest.approx(losses, abs=1e-5)
    together = to_one_process(folder / way.replace("/", "-") / "checkpoint-4", tmp_path / "whole")
    loaded = type(alone).from_pretrained(tmp_path / "whole")
    for (name, expected), consolidated, saved in zip(
        alone.named_parameters(), together.parameters(), loaded.parameters()
    ):
        torch.testing.assert_close(
            consolidated, expected, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(consolidated, saved)


@EACH_WAY
def test_a_resumed_run_ends_in_the_same_state_bit_by_bit(of_way, way):
    _, found, _ = of_way
    assert found["resumed"] == found["losses"][2:]
    assert found["resumed hash"] == found["hash"]


@EACH_WAY
def test_plan_says_how_many_numbers_a_process_holds(of_way, way):
    _, found, _ = of_way
    parallel, form = way.split("/")
    planned = plan(FORMS[form], parallel=parallel, processes=2, length=7).parameter_bytes // 4
    assert found["local"] == planned


def test_another_recipe_is_refused_by_field(world):
    assert "`batch_size` was 4 and is 2" in world.results["refused"]


def test_gradients_are_clipped_as_torch_does():
    model, twin = (build(FORMS["dense"], AutoModelForCausalLM).train() for _ in range(2))
    for own in (model, twin):
        own(**stack(examples(4))).loss.backward()
    clip(model, 0.1)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    for mine, torchs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, torchs.grad)


def test_a_checkpoint_that_was_not_committed_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="its save did not finish"):
        to_one_process(world.folder / "dense", tmp_path / "out")


def test_the_loop_wants_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        variform.training.parallel.train_in_parallel("x", [], tmp_path, Recipe("tp", 1, 1))


@pytest.mark.parametrize("form", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_trainer_in_two_processes_is_trainer_with_twice_the_batch(tmp_path, form):
    lay_out(tmp_path)
    run("parallel_ddp.py", str(tmp_path), form, "2")
    run("parallel_ddp.py", str(tmp_path), form, "4", processes=1)
    two, one = (torch.load(tmp_path / f"{form}-{count}.pt") for count in (2, 1))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert math.isfinite(one["losses"][0]) and one["losses"][0] != one["losses"][-1]
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-5, rtol=1e-4)
