"""Train an encoder-decoder to turn texts into texts: pronounce, translate, summarise; or to fill in spans, as T5 learns first.

    python finetune/seq2seq.py --config configs/recipes/pronunciation.yaml --minutes 5 --prompts hello transformer
    python finetune/seq2seq.py --config configs/recipes/translation.yaml
    python finetune/seq2seq.py --model path/to/t5 --train_files train.jsonl --metrics rouge --use_peft true
    python finetune/seq2seq.py --objective spans --form t5-small --tokenizer runs/tokenizer --train_files 'books/*.txt'

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import DatasetDict
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
)

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.masking import masked_scores
from variform.training.data.packing import PackedDataset, PackedOrPlain, PackingCollator
from variform.training.data.span_corruption import SetEpoch, SpanCorruption
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_documents, tokenize_pairs
from variform.training.evaluation.baselines import copy_source, lead_words
from variform.training.evaluation.scores import SCORES, TextScores, count_answers
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.reload import prove_reload
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.sweep import is_swept, sweep
from variform.training.tokenizer import letters_and_symbols_tokenizer
from variform.training.trainers import SafeSeq2SeqTrainer


@dataclass
class TextToTextArguments:
    """What this task needs besides. `tokenizer: letters` has a token a character of the sources, and a word of the targets."""

    objective: Literal["pairs", "spans"] = field(
        default="pairs", metadata={"help": "Learn targets from texts, or spans that are cut out of texts."}
    )
    prefix: str = field(default="", metadata={"help": "What stands before each text, such as 'summarize: '."})
    max_source_length: int = field(default=128, metadata={"help": "Tokens of a text; what is longer is cut."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a target; what is longer is cut."})
    rows: Literal["pad", "pack"] = field(
        default="pad", metadata={"help": "A row of a batch holds one example, or several that do not see each other."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["bleu", "chrf"], metadata={"help": f"What judges the answers: {', '.join(SCORES)}."}
    )
    references_column: str = field(
        default="target", metadata={"help": "The column with the right answer, or with several."}
    )
    baseline: Literal["none", "copy", "lead"] = field(
        default="none", metadata={"help": "Judge also the text itself, or its first words."}
    )
    beams: list[int] = field(default_factory=lambda: [1], metadata={"help": "Beam widths to judge with."})
    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to answer at the end."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [TextToTextArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, Seq2SeqTrainingArguments]
    parsed = parse_recipe(parts, argv, defaults=defaults(predict_with_generate="true"), description=__doc__)
    task, source, start, lora, options, training = parsed
    if is_swept(options):
        return sweep(main, argv, parsed, length="max_source_length", read_tokenizer=read_tokenizer)
    check_task(task, start)
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    pairs = task.objective == "pairs"
    training.predict_with_generate = pairs
    data = load_data(source, needs=columns_of(task))
    tokenizer = load_tokenizer(start, run.trained) if run.trained else read_tokenizer(task, source, start, data=data)
    auto_class = AutoModelForSeq2SeqLM
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    check_length(model.config, task.max_source_length, "max_source_length", stack="encoder")
    check_length(model.config, task.max_target_length, "max_target_length")
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_source_length)
    model.generation_config.max_length = task.max_target_length + 1  # the token that the decoder starts with counts
    make = make_pairs if pairs else make_spans
    train_on, judged, report = make(task, data, tokenizer, model.config, training.seed)
    run.say(facts(data), report)
    judging = judging_of(task, data, tokenizer)
    callbacks = [] if pairs else [SetEpoch(train_on)]
    pad = DataCollatorForSeq2Seq(tokenizer, model=model)
    if task.rows == "pack":
        train_on = PackedDataset(
            train_on, task.max_source_length, max_target_length=task.max_target_length, seed=training.seed
        )
        run.say({"packed": train_on.facts()}, {})
        pack = PackingCollator(model.config, task.max_source_length, max_target_length=task.max_target_length)
    trainer = run.trainer(
        SafeSeq2SeqTrainer,
        model=model,
        train_dataset=train_on,
        eval_dataset=judged,
        processing_class=tokenizer,
        data_collator=PackedOrPlain(pack, pad) if task.rows == "pack" else pad,
        bucket_by=("input_ids", "labels") if pairs and task.rows == "pad" else None,
        callbacks=callbacks,
        **judging,
    )
    if not run.train(trainer):
        return STOPPED
    measured = judge(trainer, task)
    others = compare(task, data)
    run.show_scores("Held-out texts", {**measured, **others})
    if task.prompts and trainer.is_world_process_zero():
        answer(run, trainer.model, tokenizer, task)
    run.finish(
        trainer,
        {**measured, "baselines": others},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Turns text into text: {', '.join(f'{name} {value:.2f}' for name, value in measured.items())}.",
            example=task.prefix + (task.prompts or data["validation"]["text"])[0],
            dataset=source.dataset or "files",
            evaluated_on=f"{len(judged):,} held-out texts",
            figures=[Figure(name.split(",")[0], name, value, unit="") for name, value in measured.items()],
            baselines=others,
            data=facts(data),
        ),
    )
    return 0


def columns_of(task: TextToTextArguments) -> tuple[str, ...]:
    """The columns that the task reads, each once and in an order: a fingerprint of the data heeds it."""
    return tuple(dict.fromkeys(("text", "target", task.references_column))) if task.objective == "pairs" else ("text",)


def check_task(task: TextToTextArguments, start: ModelArguments) -> None:
    """Raises ValueError for what reads targets, where texts are all there is."""
    readers = {"baseline": task.baseline != "none", "tokenizer": start.tokenizer == "letters"}
    for name, reads_targets in readers.items():
        if task.objective == "spans" and reads_targets:
            value = task.baseline if name == "baseline" else start.tokenizer
            raise ValueError(f"`{name}={value}` reads targets, and `objective=spans` has texts alone.")


def read_tokenizer(
    task: TextToTextArguments, source: DataArguments, start: ModelArguments, *, data: DatasetDict | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a new run: `letters` has the characters of all texts, and the words of all targets, runs of capitals."""
    if start.tokenizer != "letters":
        return load_tokenizer(start)
    splits = (data or load_data(source, needs=columns_of(task))).values()
    letters = {letter for split in splits for text in split["text"] for letter in text}
    return letters_and_symbols_tokenizer(
        letters, {word for split in splits for target in split["target"] for word in target.split()}
    )


def make_pairs(
    task: TextToTextArguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, config: Any, seed: int
) -> tuple:
    """Examples to train on and to judge by, and what was cut or dropped."""
    pairs = tokenize_pairs(
        data,
        tokenizer,
        max_source_length=task.max_source_length,
        max_target_length=task.max_target_length,
        prefix=task.prefix,
        vocab_size=config.encoder.vocab_size,
        target_vocab_size=config.decoder.vocab_size,
    )
    if pairs.report["validation dropped"]:  # each answer is held to the target in its place
        raise ValueError(
            f"{pairs.report['validation dropped']} held-out targets have no token: leave their lines out."
        )
    return pairs.data["train"], pairs.data["validation"], pairs.report


def make_spans(
    task: TextToTextArguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, config: Any, seed: int
) -> tuple:
    """The same of texts with spans cut out, other ones each epoch; those that are judged stay as they are."""
    texts = tokenize_documents(
        data, tokenizer, max_length=task.max_source_length, vocab_size=config.encoder.vocab_size
    )
    train_on, judged = (SpanCorruption(texts.data[split], tokenizer, seed=seed) for split in ("train", "validation"))
    longest = max(len(example["labels"]) for examples in (train_on, judged) for example in examples)
    if longest > task.max_target_length:
        raise ValueError(
            f"The spans of a text take {longest} tokens, `max_target_length` is {task.max_target_length}: raise it, or lower "
            "`max_source_length`."
        )
    return train_on, judged, texts.report


def judging_of(task: TextToTextArguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How answers are judged, as arguments of a Trainer: generated texts by their metrics, spans token by token."""
    if task.objective == "pairs":
        return {"compute_metrics": TextScores(tokenizer, data["validation"][task.references_column], task.metrics)}
    return {"compute_metrics": masked_scores, "preprocess_logits_for_metrics": count_answers}


def judge(trainer: Any, task: TextToTextArguments) -> dict[str, float]:
    """The scores, of texts with each beam width."""
    if task.objective == "spans":
        measured = trainer.evaluate()
        return {name: measured[f"eval_{name}"] for name in ("perplexity", "accuracy")}
    scores = {}
    for width in task.beams:
        measured = trainer.evaluate(num_beams=width)
        how = "" if width == 1 else f", beam {width}"
        scores |= {f"{name}{how}": measured[f"eval_{name}"] for name in trainer.compute_metrics.names}
    return scores


def compare(task: TextToTextArguments, data: DatasetDict) -> dict[str, float]:
    """The scores of a baseline that has learned nothing."""
    if task.baseline == "none":
        return {}
    if task.baseline == "copy":
        return copy_source(data, task.metrics)
    return lead_words(data, task.metrics)


def answer(run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, task: TextToTextArguments) -> None:
    """Print what the model makes of texts, and that the saved model says the same in new processes; adapters are none there."""
    texts = [task.prefix + text for text in task.prompts]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    answers = tokenizer.batch_decode(model.eval().generate(**batch), skip_special_tokens=True)
    for text, said in zip(task.prompts, answers):
        run.console.print(f"  {text:20} {said}")
    if not hasattr(model, "peft_config"):
        prove_reload(run.folder, texts, answers, console=run.console)


if __name__ == "__main__":
    run_script(main)
