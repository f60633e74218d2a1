"""A stranger's path: from plain texts to a published model, in an environment that knows Variform from its wheel alone.

`make stranger` makes that environment, says in `STRANGER` where it is, and runs this file. Each step is a command that a person
would type, in a folder that holds copies of finetune/ and configs/ and nothing else of this repository; each is one process.
The last step uninstalls Variform there, so the path can be walked once.

The texts are Python's own: it is pretrained on the help topics of `pydoc`, and fine-tuned on docstrings.
"""

import ast
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

ROOT = Path(__file__).parents[2]
HELD_OUT_TOPICS = 9
DOCUMENTED = """
argparse ast bdb calendar cmd codecs contextlib copy csv datetime decimal difflib doctest enum
fileinput fractions ftplib functools heapq imaplib inspect mailbox optparse os pathlib pdb
pickletools random shutil smtplib socket statistics string subprocess tarfile tempfile threading
turtle typing zipfile
"""
LONGEST = 300  # seconds of a step

RECIPE = """\
# A decoder whose tokens look back through a window, in its second layer, and choose two of four experts
train_files: [texts/topics/*.txt]
eval_files: [texts/held_out/*.txt]
tokenizer: runs/tokenizer
max_length: 64
form:
  model_type: variform_decoder
  hidden_size: 48
  moe_intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 2
  num_experts: 4
  num_experts_per_tok: 2
  initializer_range: 0.1
max_steps: 240
per_device_train_batch_size: 8
learning_rate: 1e-2
lr_scheduler_type: cosine
logging_steps: 20
save_steps: 40
"""
WINDOW = "attention_patterns=[full, sliding_window:16]"
PRETRAIN = ["finetune/causal_lm.py", "--config", "recipe.yaml", "--set", WINDOW]
PROMPTS = ["The statement", "If the module"]
# What a user of the published model would write; `trust` where Variform is not installed
GENERATE = """
import json, sys
from importlib.util import find_spec
folder, trust, prompts = json.loads(sys.argv[1])
if not trust:
    import variform
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
written = [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=24)[0] for text in prompts]
texts = tokenizer.batch_decode(written, skip_special_tokens=True)
print(json.dumps({"texts": texts, "class": type(model).__module__, "installed": find_spec("variform") is not None}))
"""


class Place:
    """The stranger's folder, and commands in it."""

    def __init__(self, environment: Path, folder: Path):
        self.environment, self.folder = environment, folder
        variables = {"HOME": str(folder), "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        variables |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        self.variables = {**variables, "TOKENIZERS_PARALLELISM": "false"}

    def start(self, *command: str) -> subprocess.Popen:
        """A script (`finetune/NAME.py`) or a program of the environment, with its arguments."""
        words = ["python", *command] if command[0].endswith(".py") or command[0].startswith("-") else list(command)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        program = str(self.environment / "bin" / words[0])
        return subprocess.Popen([program, *words[1:]], cwd=self.folder, env=self.variables, text=True, **pipes)

    def finish(self, process: subprocess.Popen) -> str:
        """What it said; it must end well."""
        said, _ = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        return said

    def run(self, *command: str) -> str:
        return self.finish(self.start(*command))

    def read(self, *parts: str) -> dict:
        return json.loads(self.folder.joinpath(*parts).read_text(encoding="utf-8"))

    def losses(self, run: str) -> list[float]:
        lines = (self.folder / run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def weights(self, run: str) -> str:
        return hashlib.sha256((self.folder / run / "model.safetensors").read_bytes()).hexdigest()

    def committed(self, run: str) -> set[int]:
        """The steps of the checkpoints that are whole."""
        manifests = (self.folder / run).glob("checkpoint-*/checkpoint_complete.json")
        return {int(path.parent.name.removeprefix("checkpoint-")) for path in manifests}


def docstrings() -> list[str]:
    """The longer ones of some modules of the standard library, each once."""
    found: dict[str, None] = {}
    for name in DOCUMENTED.split():
        tree = ast.parse(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 300:
                    found[text] = None
    return list(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    for name in ("finetune", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for number, name in enumerate(sorted(topics)):
        part = folder / "texts" / ("held_out" if number % len(topics) < HELD_OUT_TOPICS else "topics")
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in docstrings())
    (folder / "texts" / "docstrings.jsonl").write_text(rows, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return Place(Path(os.environ["STRANGER"]).absolute(), folder)


def kill(place: Place, process: subprocess.Popen, run: str, *, beyond: int) -> int:
    """Kills a training a moment after a checkpoint of a step beyond that is committed; returns the newest such step."""
    deadline = time.monotonic() + LONGEST
    while max(place.committed(run), default=0) <= beyond:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # somewhere in the steps that follow
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (place.folder / run / "model.safetensors").exists()
    return max(place.committed(run))


def test_the_path(place):
    # The wheel, and not this repository
    at = place.run("-c", "import variform; print(variform.__file__)").strip()
    assert Path(at).is_relative_to(place.environment)
    assert len(list((place.folder / "texts" / "held_out").iterdir())) == HELD_OUT_TOPICS

    # A tokenizer
    files = ["--train_files", "texts/topics/*.txt", "--eval_files", "texts/held_out/*.txt", "--sample_by", "document"]
    options = ["--frame", "start", "--vocab_size", "1000", "--output_dir", "runs/tokenizer"]
    said = place.run("finetune/tokenizer.py", *files, *options)
    assert "The tokenizer is in runs/tokenizer." in said
    measured = place.read("runs/tokenizer/metrics.json")
    assert measured["bytes_per_token"] > 2 and measured["texts_that_come_back_exactly_%"] == 100

    # Two trainings of one recipe: one is left in peace, the other is killed twice
    whole = place.start(*PRETRAIN, "--output_dir", "runs/whole")
    command = [*PRETRAIN, "--output_dir", "runs/writer"]
    first = kill(place, place.start(*command), "runs/writer", beyond=0)
    second = kill(place, place.start(*command), "runs/writer", beyond=first)
    said = place.run(*command)
    assert f"Going on from runs/writer/checkpoint-{second}." in said
    assert "Going on from" not in place.finish(whole)
    assert place.weights("runs/writer") == place.weights("runs/whole")
    figures = [place.read(run, "metrics.json") for run in ("runs/writer", "runs/whole")]
    assert figures[0]["bits_per_byte"] == figures[1]["bits_per_byte"] and figures[0]["steps"] == 240
    losses = place.losses("runs/writer")
    assert losses == place.losses("runs/whole") and len(losses) == 12
    assert math.isfinite(losses[-1]) and losses[-1] < 0.75 * losses[0]
    assert figures[0]["bits_per_byte"] < 4
    for name in ("README.md", "card.json", "train_config.yaml", "plots/curves.png", "tokenizer.json"):
        assert (place.folder / "runs" / "writer" / name).is_file(), name
    form = place.read("runs/writer/config.json")
    assert form["num_experts"] == 4 and form["attention_patterns"][1] == {"name": "sliding_window", "window": 16}
    assert "holds a trained model" in place.run(*command)  # it only judges again
    assert place.read("runs/writer/metrics.json")["bits_per_byte"] == figures[0]["bits_per_byte"]

    # LoRA on other texts, merged
    more = ["--train_files", "texts/docstrings.jsonl", "--held_out", "40", "--max_length", "64"]
    lora = ["--model", "runs/writer", "--use_peft", "true", "--lora_r", "4", "--output_dir", "runs/lora"]
    steps = ["--max_steps", "60", "--logging_steps", "10"]
    rate = ["--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]
    place.run("finetune/causal_lm.py", *more, *lora, *steps, *rate)
    assert place.losses("runs/lora")[-1] < place.losses("runs/lora")[0]
    assert not (place.folder / "runs" / "lora" / "model.safetensors").exists()
    said = place.run("finetune/merge_lora.py", "--adapter", "runs/lora", "--output_dir", "runs/merged")
    assert "Merged into runs/merged" in said

    # Judged: the merged model as its adapter was, and better at these texts than what it was made from
    judged = {}
    for name in ("writer", "merged"):
        judge = ["finetune/evaluate.py", "--model", f"runs/{name}", *more, "--output_dir", f"runs/judged-{name}"]
        assert "Bits per byte of held-out text" in place.run(*judge)
        judged[name] = place.read(f"runs/judged-{name}/metrics.json")["bits_per_byte"]
    adapted = place.read("runs/lora/metrics.json")["bits_per_byte"]
    assert judged["merged"] == pytest.approx(adapted, abs=1e-4)
    assert judged["merged"] < judged["writer"] - 0.1

    # Published, to a folder
    options = ["--dry-run", "--folder", "published", "--repo-id", "me/writer"]
    place.run("variform", "publish", "runs/merged", *options)
    files = {path.name for path in (place.folder / "published").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "modeling_variform.py"} <= files

    # Written with: by the script, by AutoModel beside Variform, and at last where there is none
    options = ["--max_new_tokens", "24", "--prompts", *PROMPTS]
    written = place.run("finetune/generate.py", "--model", "runs/merged", *options)
    there = json.loads(place.run("-c", GENERATE, json.dumps(["published", False, PROMPTS])).splitlines()[-1])
    place.run("-m", "pip", "uninstall", "--yes", "--quiet", "variform")
    elsewhere = json.loads(place.run("-c", GENERATE, json.dumps(["published", True, PROMPTS])).splitlines()[-1])
    assert there["installed"] and not elsewhere["installed"]
    assert there["class"].startswith("variform.") and elsewhere["class"].startswith("transformers_modules.")
    assert there["texts"] == elsewhere["texts"]
    for prompt, text in zip(PROMPTS, there["texts"]):
        assert text in written
        assert text.startswith(prompt) and len(text) > len(prompt)
