"""finetune/causal_lm.py --parallel: two processes share the weights, and leave one whole model."""

import os
import subprocess
import sys

import pytest
import torch
from script_inputs import ROOT, WORDS, form
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]


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


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--rows", "pad"], "`parallel=fsdp2` needs `rows: join`"),
        (["--max_steps", "-1"], "`parallel` needs `max_steps`"),
        (["--gradient_accumulation_steps", "2"], "`parallel` takes whole batches"),
        (["--use_peft", "true"], "`parallel` trains whole models"),
    ],
)
def test_what_the_plain_loop_does_not_do_is_refused(load_script, arguments, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_script("causal_lm").main([*arguments, "--form", form("decoder"), "--parallel", "fsdp2", *more])
