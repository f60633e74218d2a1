"""Model cards filled from a run: what has no value is left out, and nothing needs a network."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md")


@dataclass
class Figure:
    """One measured figure.

    Args:
        metric: the identifier of the metric, as in the model index of the Hub: "wer".
        name: what was measured, for people: "word error rate, greedy".
        value: in per cent.
    """

    metric: str
    name: str
    value: float


@dataclass
class CardFacts:
    """What is known about a model; whatever is left empty does not appear in the card.

    Args:
        name: the title.
        summary: what the model does, in a sentence or two.
        usage: a Python snippet that runs as it stands.
        task: the task's identifier in the model index of the Hub.
        dataset: identifier of the dataset, as in the model index.
        evaluated_on: what the figures were measured on, in words.
        figures: measured by this project, in this run.
        published: `{system: figure}` of others, with `published_source` saying where and how comparable.
        data, training: `{what: value}`, printed as lists.
        command: the exact command that trained the model.
        form: the config, as YAML.
        limits: what the model cannot do.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as language, license and tags.
    """

    name: str
    summary: str
    usage: str = ""
    task: str = ""
    dataset: str = ""
    evaluated_on: str = ""
    figures: list[Figure] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    published_source: str = ""
    data: dict[str, str] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    command: str = ""
    form: str = ""
    limits: str = ""
    metadata: dict = field(default_factory=dict)


def make_card(facts: CardFacts) -> ModelCard:
    """The card of a model, its figures also in the metadata (model index) that the Hub reads."""
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=facts.dataset,
            dataset_name=facts.evaluated_on,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=round(figure.value, 2),
        )
        for figure in facts.figures
    ]
    metadata = ModelCardData(
        library_name="transformers", model_name=facts.name, eval_results=results or None, **facts.metadata
    )
    return ModelCard.from_template(metadata, template_path=str(TEMPLATE), **vars(facts))


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Write the card of the model in `folder`, where the Hub looks for it; returns its path."""
    path = Path(folder) / "README.md"
    make_card(facts).save(path)
    return path


def environment() -> dict[str, str]:
    """The machine and the versions a model was trained with, for `CardFacts.training`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "hardware": f"{device}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
