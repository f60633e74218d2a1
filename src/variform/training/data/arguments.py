"""The arguments that say which data a script reads."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .sources import SOURCES

SAMPLES = ("line", "paragraph", "document")
HELD_OUT = 0.1


def _column(role: str) -> Any:
    return field(default=None, metadata={"help": f"The column with the {role}, where that is not obvious."})


@dataclass
class DataArguments:
    """Which data, and which columns of it."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": f"A set that a package carries ({', '.join(SOURCES)}), a local file, glob or folder, or a Hub id."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of `dataset`."})
    dataset_revision: str | None = field(default=None, metadata={"help": "The commit or tag of a Hub id."})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Instead of `dataset`: files or globs; text, JSON lines, CSV or parquet."}
    )
    eval_files: list[str] | None = field(default=None, metadata={"help": "The same for the held-out part."})
    train_split: str = field(default="train", metadata={"help": "The split of a folder or Hub id to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Its split to judge by; by default `validation`, else `test`."}
    )
    sample_by: str = field(
        default="line",
        metadata={"help": "What an example of a text file is: line, paragraph or document."},
    )
    text_column: str | None = _column("text")
    text_pair_column: str | None = _column("second text")
    target_column: str | None = _column("text to answer with")
    label_column: str | None = _column("class")
    tokens_column: str | None = _column("words")
    tags_column: str | None = _column("tag of each word")
    question_column: str | None = _column("question")
    context_column: str | None = _column("paragraph that answers it")
    answers_column: str | None = _column("answers, as in SQuAD")
    prompt_column: str | None = _column("prompt")
    chosen_column: str | None = _column("better answer")
    rejected_column: str | None = _column("worse answer")
    held_out: float | None = field(
        default=None,
        metadata={
            "help": f"Where the data has no part to judge by: so many examples, or below 1 such a part of them ({HELD_OUT})."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the shuffle that holds them out."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on the first so many."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Judge by the first so many."})
    skip_bad_rows: int = field(default=0, metadata={"help": "Leave out up to so many rows that cannot be used."})

    def __post_init__(self):
        if self.sample_by not in SAMPLES:
            raise ValueError(f"`sample_by` must be one of {', '.join(SAMPLES)}, got {self.sample_by!r}.")
        if self.skip_bad_rows < 0:
            raise ValueError(f"`skip_bad_rows` counts rows, got {self.skip_bad_rows}.")
        if self.held_out is not None and (self.held_out <= 0 or (self.held_out > 1 and self.held_out % 1)):
            raise ValueError(f"`held_out` is a part below 1 or a number of examples, got {self.held_out}.")
        for name in ("max_train_examples", "max_eval_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if bool(self.dataset) == bool(self.train_files):
            raise ValueError("One of `dataset` and `train_files` says what to train on; got both or neither.")

    def columns(self) -> dict[str, str | None]:
        """`{role: column}` as far as they were given."""
        return {
            name.removesuffix("_column"): value for name, value in asdict(self).items() if name.endswith("_column")
        }
