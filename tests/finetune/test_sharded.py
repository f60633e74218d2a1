"""finetune/causal_lm.py --parallel: two processes share the weights, and leave one whole model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from script_inputs import ROOT, WORDS, form
from transformers import AutoModelForCausalLM, AutoTokenizer

from variform.training.sharded import StepLog

STEPS = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
STEPS += ["--logging_steps", "2"]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(" ".join(WORDS[n % 7 :]) for n in range(60)), encoding="utf-8")
    (tmp_path / "eval.txt").write_text("a good story", encoding="utf-8")
    files = ["--train_files", str(tmp_path / "train.txt"), "--eval_files", str(tmp_path / "eval.txt")]
    return [*files, "--tokenizer", "bytes", "--max_length", "32", "--output_dir", str(tmp_path / "run"), *STEPS]


def torchrun(*arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "finetune/causal_lm.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("parallel", "fields"),
    [
        ("fsdp2", {}),
        pytest.param("tp", {}, marks=pytest.mark.slow),
        pytest.param("ep", {"num_experts": 4, "moe_intermediate_size": 16}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_share_the_weights_and_leave_one_model(arguments, tmp_path, parallel, fields):
    said = torchrun(*arguments, "--form", form("decoder", **fields), "--parallel", parallel)
    assert f"The whole model is in {tmp_path / 'run' / 'whole'}" in said
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).eval() for name in ("start", "whole")
    )
    ids = AutoTokenizer.from_pretrained(tmp_path / "run" / "whole")(" ".join(WORDS), return_tensors="pt")
    with torch.no_grad():
        losses = [model(**ids, labels=ids["input_ids"]).loss.item() for model in (before, after)]
    assert losses[1] < losses[0] - 0.1
    assert "Step 2 of 4: loss " in said and "Step 4 of 4: loss " in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[1]["loss"] < lines[0]["loss"]
    if parallel == "fsdp2":  # begun anew, it comes to the same; gone on with, there is nothing left
        again = torchrun(*arguments, "--form", form("decoder"), "--parallel", parallel, "--resume", "none")
        assert "Set aside an earlier run's checkpoint-4" in again and "Step 2 of 4" in again
        assert [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == lines


@pytest.mark.parametrize("last", [1, 3])
def test_a_log_that_goes_on_drops_what_comes_again(tmp_path, last):
    told = []
    first = StepLog(tmp_path, 4, 0.25, told.append)
    for step in range(1, last + 1):
        first(step, 5.0 - step)
    second = StepLog(tmp_path, 4, 1, told.append)
    for step in range(2, 5):
        second(step, 5.0 - step)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 5.0 - step} for step in range(1, 5)]
    assert "Going on from step 1." in told


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--rows", "pad"], "`parallel=fsdp2` needs `rows: join`"),
        (["--max_steps", "-1"], "`parallel` needs `max_steps`"),
        (["--gradient_accumulation_steps", "2"], "`parallel` takes whole batches"),
        (["--use_peft", "true"], "`parallel` trains whole models"),
        (["--optim", "sgd"], "`optim=.*sgd.*` has no place in the loop of `parallel`"),
        (["--adam_beta1", "0.1"], "`adam_beta1=0.1` has no place"),
        (["--report_to", "tensorboard"], "`report_to=.*tensorboard.*` has no place"),
        (["--allow_resume_changes", "seed"], "`parallel` goes on from its newest checkpoint with the same recipe"),
        (["--prompts", "so"], "`prompts` are gone on with by one process"),
    ],
)
def test_what_the_plain_loop_does_not_do_is_refused(load_script, arguments, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_script("causal_lm").main([*arguments, "--form", form("decoder"), "--parallel", "fsdp2", *more])
