"""The last proof of a published model: another process, with nothing but transformers, computes and answers the same."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-5  # relative to the largest entry; the same code on the same machine gives 0

PROGRAM = """
import json, sys
folder, texts, remote, auto_class = json.load(sys.stdin)
if remote:
    sys.modules["variform"] = None  # importing Variform fails: only the code in the folder is there
else:
    import variform
import transformers
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=remote)
answers = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))
print(json.dumps(tokenizer.batch_decode(answers, skip_special_tokens=True)))
"""
# What both processes do is `outputs_of` and `tokens_of`, whose text stands between the two parts
BEFORE = """
import json, sys
sys.modules["variform"] = None
import torch, transformers
from collections.abc import Mapping, Sequence
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
"""
AFTER = """
job = json.load(sys.stdin)
auto_class, trust = getattr(transformers, job["auto_class"]), job["remote_code"]
options = {"trust_remote_code": trust, "output_loading_info": True, "dtype": torch.float32}
model, info = auto_class.from_pretrained(job["base"] or job["folder"], **options)
wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
if wrong and not job["base"]:  # an adapter may bring the head that its base lacks
    sys.exit(f"not every tensor has its place: {wrong}")
if job["base"]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, job["folder"])
results = outputs_of(model, load_file(job["inputs"]))
if job["texts"]:
    results["tokens"] = tokens_of(AutoTokenizer.from_pretrained(job["folder"]), job["texts"])
save_file(results, job["results"])
"""


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor that a model returns in evaluation, by name; where it can generate, also what it does, `generated`.

    Args:
        inputs: a batch, as the model's forward takes it.
    """
    outputs = model.eval()(**inputs, return_dict=True)
    tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if model.can_generate():
        prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        tensors["generated"] = model.generate(**prompt, max_new_tokens=8, do_sample=False, num_beams=1)
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """The ids of texts, one after another."""
    return torch.tensor([token for ids in tokenizer(list(texts))["input_ids"] for token in ids])


def outputs_of_new_process(
    folder: str | Path,
    inputs: Mapping[str, torch.Tensor],
    *,
    auto_class: str,
    remote_code: bool,
    base: str | Path | None = None,
    texts: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """What a model computes in a new process in which Variform cannot be imported, loaded through an Auto class, in float32.

    Args:
        folder: a checkpoint, or an adapter as PEFT saves it.
        inputs: a batch, as the model's forward takes it.
        auto_class: the name of the Auto class.
        remote_code: whether the code in the folder may run; a native model needs none.
        base: of an adapter, the model that it adapts.
        texts: to be read by the folder's tokenizer.

    Returns:
        The `outputs_of` the model there and, with texts, their ids as `tokens`.

    Raises:
        RuntimeError: when the process fails, or a tensor has no place or no value; holds the last lines it wrote.
    """
    program = BEFORE + inspect.getsource(outputs_of) + inspect.getsource(tokens_of) + AFTER
    with tempfile.TemporaryDirectory() as exchange:
        job: dict[str, Any] = {"auto_class": auto_class, "remote_code": remote_code, "texts": list(texts)}
        job |= {"folder": str(Path(folder).resolve()), "base": None if base is None else absolute(base)}
        job |= {name: str(Path(exchange, f"{name}.safetensors")) for name in ("inputs", "results")}
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, job["inputs"])
        # A cache of code of its own: nothing that was loaded here before is taken in its place
        run_program(program, job, folder, cwd=exchange, env={**os.environ, "HF_MODULES_CACHE": exchange})
        return load_file(job["results"])


def prove_outputs(
    folder: str | Path, expected: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], **kwargs: Any
) -> float:
    """Compares what a folder computes in a new process with what it should.

    Args:
        folder, inputs, kwargs: as for `outputs_of_new_process`.
        expected: tensors by name; all must come back.

    Returns:
        The largest difference, relative to the largest entry of its tensor.

    Raises:
        RuntimeError: if one differs by more than 1e-5, in its shape or in whole numbers, or the process fails.
    """
    found = outputs_of_new_process(folder, inputs, **kwargs)
    largest = 0.0
    for name, tensor in expected.items():
        if name not in found or found[name].shape != tensor.shape:
            shape = tuple(found[name].shape) if name in found else "nothing"
            raise RuntimeError(f"{folder}, in a new process, gives {shape} as `{name}` and not {tuple(tensor.shape)}.")
        difference = relative_difference(found[name], tensor)
        if not difference <= (TOLERANCE if tensor.is_floating_point() else 0):
            raise RuntimeError(
                f"{folder}, in a new process, gives another `{name}`: {difference:.1e} of its largest entry."
            )
        largest = max(largest, difference)
    return largest


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors, in parts of the largest entry; NaN where either holds one."""
    if torch.equal(found, expected):
        return 0.0
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((found.double() - expected.double()).abs().max() / scale).item()


def absolute(source: str | Path) -> str:
    """A local folder from wherever it is asked for; a repo on the Hub as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def run_program(program: str, given: Any, folder: str | Path, **kwargs: Any) -> str:
    """What a Python program, given a value on its standard input as JSON, writes on its standard output.

    Raises:
        RuntimeError: when it fails; holds the last lines of its errors.
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False, **kwargs)
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"The model in {folder} does not load in a new process:\n{last_lines}")
    return done.stdout


def answers_of_new_process(
    folder: str | Path, texts: list[str], *, remote_code: bool, auto_class: str = "AutoModelForSeq2SeqLM"
) -> list[str]:
    """Load the model in `folder` through an Auto class in a new process and let it answer.

    Args:
        folder: what `save_pretrained` of the model and of the tokenizer wrote.
        texts: the inputs, answered as one batch.
        remote_code: with True, Variform cannot be imported there and the code saved in the folder is run; with
            False, Variform is imported and no code from the folder is.
        auto_class: the name of the Auto class.

    Raises:
        RuntimeError: when the process fails; holds the last lines it wrote.
    """
    return json.loads(run_program(PROGRAM, [str(folder), texts, remote_code, auto_class], folder).splitlines()[-1])


def prove_reload(folder: str | Path, texts: list[str], answers: list[str], *, console: Console, **kwargs: str) -> None:
    """Print that the saved model gives `answers` in new processes, with Variform and without it.

    Args:
        folder, texts, kwargs: as for `answers_of_new_process`.

    Raises:
        RuntimeError: when a process fails or gives other answers.
    """
    for remote_code in (False, True):
        where = "without Variform" if remote_code else "with Variform"
        if answers_of_new_process(folder, texts, remote_code=remote_code, **kwargs) != answers:
            raise RuntimeError(f"{folder}, loaded in a new process {where}, gives other answers.")
        console.print(f"Loaded back in a new process {where}: the same answers.")
