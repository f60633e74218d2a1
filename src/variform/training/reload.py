"""The last proof of a published model: another process, with nothing but transformers, gets the same answers."""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(folder), texts, remote_code, auto_class]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"The model in {folder} does not load in a new process:\n{last_lines}")
    return json.loads(done.stdout.splitlines()[-1])


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
