"""Classes told by examples in the prompt, without a step of training (GPT-3, arXiv:2005.14165): prompts, scores, the curve."""

import copy
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...model.outputs import CACHE
from ..data.windows import begin
from ..models import check_length

INK, GREY, DRAWN = "#22303c", "#66747f", "#1d4f7c"


class Template(NamedTuple):
    """What stands around the text and the class of an example.

    Args:
        before, between, after: of `Review: {text}\\nSentiment: {label}\\n\\n`, the pieces that are not in braces.
        words: what each class is called, by its number.
    """

    before: str
    between: str
    after: str
    words: tuple[str, ...]

    @classmethod
    def read(cls, template: str, words: Sequence[str]) -> "Template":
        """A template as a recipe gives it; `\\n` of a command line is a line break.

        Raises:
            ValueError: for one that does not have `{text}` and then `{label}`, each once, or for words that are alike.
        """
        before, found, rest = template.replace("\\n", "\n").partition("{text}")
        between, also, after = rest.partition("{label}")
        if not (found and also) or "{text}" in rest or "{label}" in before + after:
            raise ValueError(f"`template` must have {{text}} and then {{label}}, each once, got {template!r}.")
        if len(set(words)) < len(words) or not all(words):
            raise ValueError(f"`label_words` must be a word for each class, all different, got {', '.join(words)}.")
        return cls(before, between, after, tuple(words))

    def example(self, text: str, label: int) -> str:
        """An example with its answer."""
        return f"{self.before}{text}{self.between}{self.words[label]}{self.after}"

    def question(self, text: str) -> str:
        """An example up to its answer; the space before that belongs to it, as tokenizers have it."""
        return f"{self.before}{text}{self.between.rstrip(' ')}"

    def answers(self) -> list[str]:
        """What may follow a question."""
        space = self.between[len(self.between.rstrip(" ")) :]
        return [space + word for word in self.words]


class Point(NamedTuple):
    """How often a model is right, in %, with so many examples in its prompt: one figure for each draw of them."""

    shots: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Of the draws, from their mean; 0 where there is one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def draw_examples(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """The numbers of `shots` rows in a shuffled order: as many of each class, or one more of some.

    With one seed, the rows of fewer shots are among those of more.

    Raises:
        ValueError: where a class has too few rows.
    """
    generator = random.Random(seed)
    classes = sorted(set(labels))
    rows = {label: [number for number, own in enumerate(labels) if own == label] for label in classes}
    for label in classes:
        generator.shuffle(rows[label])
    generator.shuffle(classes)
    if any(shots - place > len(classes) * len(rows[label]) for place, label in enumerate(classes)):
        raise ValueError(f"`few_shot={shots}` asks for more examples than a class has to train on.")
    chosen = [rows[classes[place % len(classes)]][place // len(classes)] for place in range(shots)]
    generator.shuffle(chosen)
    return chosen


@torch.no_grad()
def score_answers(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]]
) -> torch.Tensor:
    """The mean log-likelihood of a token of each answer behind its prompt, so that long answers have no disadvantage.

    What all prompts begin with is read once.

    Args:
        model: a decoder in evaluation mode.
        prompts: token ids. answers: those of what may follow each prompt, as many each.

    Returns:
        `(prompts, answers)` float32, on the CPU.
    """

    def read(ids: list[int], cache: Any) -> Any:
        return model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)

    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts))
    shared = min(len(list(alike)), min(map(len, prompts)) - 1)
    memory = getattr(read(prompts[0][:shared], None), CACHE) if shared else None
    scores = torch.empty(len(prompts), len(answers[0]))
    for row, (prompt, own) in enumerate(zip(prompts, answers)):
        output = read(prompt[shared:], copy.deepcopy(memory))
        first = output.logits[0, -1:].float()
        for column, answer in enumerate(own):
            logits = first
            if len(answer) > 1:
                rest = read(answer[:-1], copy.deepcopy(getattr(output, CACHE))).logits[0].float()
                logits = torch.cat((first, rest))
            likelihoods = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer, device=logits.device)[:, None])
            scores[row, column] = likelihoods.mean()
    return scores


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    examples: Sequence[tuple[str, int]],
    texts: Sequence[str],
) -> list[int]:
    """The class of each text that a model finds likeliest behind `examples`.

    Raises:
        ValueError: where a prompt is longer than a table of learned positions.
    """
    shown = "".join(template.example(text, label) for text, label in examples)
    prompts, answers = [], []
    for text in texts:
        question = shown + template.question(text)
        prompts.append(begin(question, tokenizer))
        # Behind the question, not alone: some tokenizers put a space before what stands first
        answers.append([begin(question + answer, tokenizer)[len(prompts[-1]) :] for answer in template.answers()])
    longest = max(map(len, prompts)) + max(len(answer) for own in answers for answer in own)
    check_length(model.config, longest, "few_shot prompts")
    return score_answers(model, prompts, answers).argmax(dim=1).tolist()


def measure_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    template: Template,
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    tell: Callable[[str], None] = print,
) -> list[Point]:
    """How often a model is right with each number of examples, drawn from `data["train"]` once a seed.

    Args:
        data: rows `{"text", "label"}`; those of "validation" are judged.
        tell: is told each figure when it is there.
    """
    train, labels = data["train"], list(data["train"]["label"])
    texts, truth = list(data["validation"]["text"]), list(data["validation"]["label"])
    points = []
    for count in shots:
        accuracies = []
        for seed in seeds if count else seeds[:1]:  # without examples there is nothing to draw
            rows = [train[number] for number in draw_examples(labels, count, seed)]
            examples = [(row["text"], row["label"]) for row in rows]
            found = answer_questions(model, tokenizer, template, examples, texts)
            accuracies.append(100 * statistics.mean(map(int.__eq__, found, truth)))
            tell(f"{count} examples, seed {seed}: {accuracies[-1]:.1f} % right")
        points.append(Point(count, accuracies))
    return points


def draw_curve(points: Sequence[Point], path: Path, *, title: str, baselines: dict[str, float]) -> Path | None:
    """Draw accuracy over the number of examples: the mean, the deviation, each draw; None where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(points))
    axes.errorbar(
        places,
        [point.mean for point in points],
        yerr=[point.deviation for point in points],
        color=DRAWN,
        marker="o",
        capsize=3,
        label="mean, deviation and each draw",
    )
    for place, point in zip(places, points):
        axes.scatter([place] * len(point.accuracies), point.accuracies, s=12, color=INK, alpha=0.5, zorder=3)
    for name, value in baselines.items():
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, label=name)
    axes.set_xticks(list(places), [str(point.shots) for point in points])
    axes.set_xlabel("examples in the prompt")
    axes.set_ylabel("right answers, %")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
