"""The last proof of a published model: another process, with nothing but transformers, gets the same answers."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
folder, texts, remote = json.load(sys.stdin)
if remote:
    sys.modules["variform"] = None  # importing Variform fails: only the code in the folder is there
else:
    import variform
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=remote)
answers = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))
print(json.dumps(tokenizer.batch_decode(answers, skip_special_tokens=True)))
"""


def answers_of_new_process(folder: str | Path, texts: list[str], *, remote_code: bool) -> list[str]:
    """Load the model in `folder` through AutoModelForSeq2SeqLM in a new process and let it answer.

    Args:
        folder: what `save_pretrained` of the model and of the tokenizer wrote.
        texts: the inputs, answered as one batch.
        remote_code: with True, Variform cannot be imported there and the code saved in the folder is run; with
            False, Variform is imported and no code from the folder is.

    Raises:
        RuntimeError: when the process fails; holds the last lines it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([str(folder), texts, remote_code]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"The model in {folder} does not load in a new process:\n{last_lines}")
    return json.loads(done.stdout.splitlines()[-1])
