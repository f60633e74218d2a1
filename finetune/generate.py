"""Go on with texts, answer them, or talk: with any model that writes.

    python finetune/generate.py --model runs/long_text --prompts 'To be, or' --do_sample true --temperature 0.8
    python finetune/generate.py --model path/to/SmolLM2.gguf --chat true
    python finetune/generate.py --model runs/translation < lines.txt

`model` is a checkpoint of Variform, one that converts, also `folder/file.gguf`, or the folder of an adapter. Without `prompts`,
each line of the standard input is one, up to an empty line or Ctrl-D. In a conversation, `/new` begins another.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from variform.training.arguments import parse_recipe
from variform.training.data.windows import begin
from variform.training.inference import load_for_use
from variform.training.models import check_length
from variform.training.options import ModelArguments
from variform.training.run import run_script

NEW = "/new"
SAMPLING = ("temperature", "top_k", "top_p")


@dataclass
class GenerationArguments:
    """What is written, and how."""

    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts; default: the standard input's lines."})
    chat: bool = field(default=False, metadata={"help": "A conversation, by the tokenizer's chat template."})
    system: str | None = field(default=None, metadata={"help": "What the model is told before a conversation."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens of an answer at most."})
    do_sample: bool = field(default=False, metadata={"help": "Draw tokens, instead of the likeliest each time."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling: below 1 is more certain."})
    top_k: int | None = field(default=None, metadata={"help": "Sampling: among the k likeliest tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sampling: among the likeliest of this part in all."})
    num_beams: int = field(default=1, metadata={"help": "Texts that are followed side by side."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1, tokens that were there are less likely."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draws; the same command writes the same."})

    def __post_init__(self):
        given = [name for name in SAMPLING if getattr(self, name) is not None]
        if given and not self.do_sample:
            raise ValueError(f"`{given[0]}` is about drawing tokens: add `--do_sample true`.")
        for name in ("max_new_tokens", "num_beams", "top_k", "temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.system is not None and not self.chat:
            raise ValueError("`system` is said before a conversation: add `--chat true`.")

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`. Where nothing is drawn, what a checkpoint says of drawing is set aside."""
        names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        drawing = {name: getattr(self, name) for name in SAMPLING}
        return {**given, **{name: value for name, value in drawing.items() if value is not None or not self.do_sample}}


def main(argv: list[str]) -> int:
    """Write; returns the exit status."""
    task, start = parse_recipe([GenerationArguments, ModelArguments], argv, description=__doc__)
    model, tokenizer = load_for_use(start)
    model.generation_config.max_length = None  # how long answers are is said here
    if task.chat and not tokenizer.chat_template:
        raise ValueError(
            f"`chat`: the tokenizer of {start.model} has no chat template; leave `chat` out to go on with texts."
        )
    set_seed(task.seed)
    if task.chat:
        talk(model, tokenizer, task)
        return 0
    for prompt in task.prompts or typed():
        ids = tokenizer(prompt)["input_ids"] if model.config.is_encoder_decoder else begin(prompt, tokenizer)
        write(model, tokenizer, ids, task, with_prompt=not model.config.is_encoder_decoder)
    return 0


def talk(model: Any, tokenizer: PreTrainedTokenizerBase, task: GenerationArguments) -> None:
    """A conversation; each answer follows all that was said before."""
    opening = [] if task.system is None else [{"role": "system", "content": task.system}]
    said = list(opening)
    for line in task.prompts or typed():
        if line.strip() == NEW:
            said = list(opening)
            continue
        said.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        said.append({"role": "assistant", "content": write(model, tokenizer, ids, task, with_prompt=False)})


def typed() -> Iterator[str]:
    """The lines of the standard input, up to an empty one."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], task: GenerationArguments, *, with_prompt: bool
) -> str:
    """Print what a model makes of some tokens, on a terminal as it comes; returns that text."""
    name, beyond = (
        ("max_source_length", 0) if model.config.is_encoder_decoder else ("max_new_tokens", task.max_new_tokens)
    )
    check_length(model.config, len(ids) + beyond, f"the prompt and {name}", stack="encoder")
    streams = sys.stdout.isatty() and task.num_beams == 1
    streamer = TextStreamer(tokenizer, skip_prompt=not with_prompt, skip_special_tokens=True) if streams else None
    prompt = torch.tensor([ids], device=model.device)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **task.options())[0]
    answer = tokenizer.decode(
        found if with_prompt or model.config.is_encoder_decoder else found[len(ids) :], skip_special_tokens=True
    )
    if streamer is None:
        print(answer, flush=True)
    return answer


if __name__ == "__main__":
    run_script(main)
