"""Model cards filled from a run: what has no value is left out, and nothing needs a network."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from .facts import environment, form_facts
from .paths import shorten_all
from .pictures import pictures_of
from .usage import checks_of, read_usage, task_of, usage_of

__all__ = [
    "CardFacts",
    "DataSource",
    "Figure",
    "environment",
    "form_facts",
    "make_card",
    "write_card",
    "write_card_or_warn",
]

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("card.md")
CARD_FILE, FACTS_FILE = "README.md", "card.json"
BLANK = "more information needed"


@dataclass
class Figure:
    """One measured figure.

    Args:
        metric: the identifier of the metric, as in the model index of the Hub: "wer".
        name: what was measured, for people: "word error rate, greedy".
        value: in `unit`.
        unit: per cent, or in words such as "bits"; empty for none.
    """

    metric: str
    name: str
    value: float
    unit: str = "%"

    @property
    def rounded(self) -> float:
        return round(self.value, 2 if self.unit == "%" or abs(self.value) >= 10 else 4)

    @property
    def text(self) -> str:
        return f"{self.value:.2f}" if self.unit == "%" else f"{self.rounded:g}"


@dataclass
class DataSource:
    """A set of data that a model was trained or judged on.

    Args:
        name: its identifier, or what it is, in words.
        sha256: of its bytes, so that another can tell whether they hold the same.
        license: as its owner states it.
        size: in words, such as "12,492 words".
    """

    name: str
    sha256: str = ""
    license: str = ""
    size: str = ""


@dataclass
class CardFacts:
    """What is known about a model; whatever is left empty does not appear in the card.

    Absolute paths of this machine may stand in any text: the card shortens them.

    Args:
        name: the title.
        summary: what the model does, in a sentence or two.
        usage: a Python snippet that runs as it stands. Default: made of `auto_class` and `example`.
        auto_class: the name of the Auto class that loads the model, such as "AutoModelForCausalLM".
        example: the input of the snippet: a text; a question and its context; a beginning and its choices.
        task: the task's identifier in the model index of the Hub. Default: that of `auto_class`.
        dataset: identifier of the dataset, as in the model index.
        evaluated_on: what the figures were measured on, in words. The model index has them where both are given.
        figures: measured by this project, in this run.
        baselines: `{system: figure}` measured by this project on the same data, in the unit of the first figure.
        published: `{system: figure}` of others, with `published_source` saying where and how comparable.
        parameters, active_parameters: all, and those that one token uses.
        sources: the data, with their hashes.
        data, training: `{what: value}`, printed as lists.
        command: the exact command that trained the model.
        form_in_words: the form on one screen. form: the config, as YAML.
        base_model: what the weights started from: a repo on the Hub, or a name.
        not_preserved: what conversion and surgery did not keep, in sentences.
        adapters: `{method: what became of it}`, such as LoRA that was merged.
        limits: what the model cannot do.
        checks: what an author should look at before others use the model. Default: by `auto_class`.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as language, license and tags.
    """

    name: str
    summary: str
    usage: str = ""
    auto_class: str = ""
    example: Any = None
    task: str = ""
    dataset: str = ""
    evaluated_on: str = ""
    figures: list[Figure] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    published_source: str = ""
    parameters: int = 0
    active_parameters: int = 0
    sources: list[DataSource] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    command: str = ""
    form_in_words: str = ""
    form: str = ""
    base_model: str = ""
    not_preserved: list[str] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    limits: str = ""
    checks: list[str] = field(default_factory=list)
    metadata: dict = field(default_factory=dict)

    def save(self, folder: str | Path, card: ModelCard | None = None) -> Path:
        """Writes card.json, from which the card can be made again; returns its path.

        Args:
            card: what was made of the facts: its hash tells later whether somebody has edited it.
        """
        path = Path(folder) / FACTS_FILE
        values = {**dataclasses.asdict(self), "card_sha256": digest(str(card)) if card else ""}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "CardFacts":
        """The facts of a folder's card.json.

        Raises:
            FileNotFoundError: if it has none. ValueError: if the file does not hold what `save` writes.
        """
        path = Path(folder) / FACTS_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("card_sha256", None)
            values["figures"] = [Figure(**figure) for figure in values.get("figures", [])]
            values["sources"] = [DataSource(**source) for source in values.get("sources", [])]
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the facts of a card: {error}.") from error


def make_card(facts: CardFacts, folder: str | Path | None = None, usage: dict[str, Any] | None = None) -> ModelCard:
    """The card of a model, its figures also in the metadata (model index) that the Hub reads.

    Args:
        facts: what it says.
        folder: of the model, and of the pictures that the card shows; none without.
        usage: arguments of `usage_of`, such as the repo to load from. Default: the folder that the card lies in.
    """
    facts = shorten_all(facts)
    task = facts.task or (task_of(facts.auto_class) if facts.auto_class else "")
    described = facts.metadata
    if facts.auto_class and task:
        described = {"pipeline_tag": task, **described}
    if "/" in facts.base_model and "base_model" not in described:
        described = {"base_model": facts.base_model, **described}
    metadata = ModelCardData(
        **{"library_name": "transformers", "model_name": facts.name, **described}, eval_results=results_of(facts, task)
    )
    values = {**vars(facts), **units_of(facts)}
    if facts.auto_class and not facts.usage:
        told = {"folder": ".", **(read_usage(Path(folder)) if folder is not None else {}), **(usage or {})}
        values["usage"] = usage_of(facts.auto_class, example=facts.example, **told)
    if facts.auto_class and not facts.checks:
        values["checks"] = checks_of(facts.auto_class)
    pictures = pictures_of(folder) if folder is not None else []
    return ModelCard.from_template(metadata, template_path=str(TEMPLATE), pictures=pictures, **values)


def results_of(facts: CardFacts, task: str) -> list[EvalResult] | None:
    """The figures as the model index has them, which must say of which task and on which data."""
    if not (task and facts.dataset and facts.evaluated_on):
        return None
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset,
            dataset_name=facts.evaluated_on,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=figure.rounded,
        )
        for figure in facts.figures
    ] or None


def units_of(facts: CardFacts) -> dict[str, Any]:
    """The tables of figures as texts: the unit stands above the column if it is one for all, else in every row."""
    units = {figure.unit for figure in facts.figures}
    unit = units.pop() if len(units) == 1 else ""
    rows = [
        (figure.name, figure.text if unit or not figure.unit else f"{figure.text} {figure.unit}")
        for figure in facts.figures
    ]
    first = facts.figures[0].unit if facts.figures else "%"
    beside = [(system, Figure("", system, value, first).text) for system, value in facts.baselines.items()]
    return {"unit": unit, "rows": rows, "first_unit": first, "beside": beside}


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Write the card of the model in `folder`, where the Hub looks for it, and its facts; returns the card's path."""
    path = Path(folder) / CARD_FILE
    card = make_card(facts, folder)
    card.save(path)
    facts.save(folder, card)
    return path


def is_edited(folder: str | Path) -> bool:
    """Whether somebody has written the card in a folder, or changed the one that we wrote there."""
    card, facts = Path(folder) / CARD_FILE, Path(folder) / FACTS_FILE
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    if not facts.is_file():
        return BLANK not in text.lower()  # what Trainer and PEFT write is a form to fill in
    return json.loads(facts.read_text(encoding="utf-8")).get("card_sha256") != digest(text)


def digest(text: str) -> str:
    """SHA-256 of a text, with the ends of lines of any machine."""
    return hashlib.sha256("\n".join(text.splitlines()).encode()).hexdigest()


def write_card_or_warn(folder: str | Path, make_facts: Callable[[], CardFacts]) -> Path | None:
    """`write_card` for the end of a run, whose model is saved by then: what goes wrong is a warning.

    Args:
        folder: of the saved model.
        make_facts: collects the facts, which may go wrong as well.

    Returns:
        The card's path; None if there is no card.
    """
    try:
        return write_card(folder, make_facts())
    except Exception as error:
        logger.warning(f"The model in {folder} is saved; its card is not: {type(error).__name__}: {error}")
        return None
