"""Teach an encoder or a decoder to give each word its tag (parts of speech, names); judge it beside the most frequent tag.

    python finetune/tag.py --config configs/recipes/tags.yaml
    python finetune/tag.py --model path/to/bert --train_files train.jsonl --eval_files test.jsonl --use_peft true

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    TrainingArguments,
)

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_words
from variform.training.evaluation.baselines import frequent_tag_accuracy
from variform.training.evaluation.metrics import load_metric
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, labels_of, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.trainers import SafeTrainer

IGNORED = -100


@dataclass
class TaggingArguments:
    """What this task needs besides."""

    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence; what is longer is cut."})
    metric: Literal["accuracy", "seqeval"] = field(
        default="accuracy", metadata={"help": "Of words, or of whole spans in tags such as B-PER and I-PER."}
    )


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [TaggingArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    task, source, start, lora, options, training = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    data = load_data(source, needs=("tokens", "tags"))
    names = data["train"].features["tags"].feature.names
    tokenizer = load_tokenizer(start, run.trained)
    auto_class = AutoModelForTokenClassification
    model = build_model(
        start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run, **labels_of(names)
    )
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length)
    examples = tokenize_words(data, tokenizer, max_length=task.max_length, vocab_size=model.config.vocab_size)
    run.say(facts(data), examples.report)
    score = Scores(names, task.metric)
    trainer = run.trainer(
        SafeTrainer,
        model=model,
        train_dataset=examples.data["train"],
        eval_dataset=examples.data["validation"],
        processing_class=tokenizer,
        bucket_by=("input_ids",),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=score,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(dim=-1),
    )
    if not run.train(trainer):
        return STOPPED
    judged = trainer.evaluate()
    measured = {name: judged[f"eval_{name}"] for name in score.names}
    others = frequent_tag_accuracy(data) if task.metric == "accuracy" else {}
    first = score.names[0]
    run.show_scores(f"{first} on held-out words, %", {"this model": measured[first], **others})
    run.finish(
        trainer,
        {**measured, "baselines": others},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Tags words, {len(names)} tags: {first} {measured[first]:.1f} % on text it has never seen.",
            example=" ".join(data["validation"]["tokens"][0]),
            dataset=source.dataset or "files",
            evaluated_on=f"{len(data['validation']):,} held-out sentences",
            figures=[Figure(name, name, value) for name, value in measured.items()],
            baselines=others,
            data=facts(data),
        ),
    )
    return 0


class Scores:
    """`compute_metrics` for a Trainer whose logits are tags already, in %."""

    def __init__(self, tags: list[str], metric: str):
        self.tags, self.metric = tags, load_metric(metric)
        self.names = ("accuracy",) if metric == "accuracy" else ("f1", "precision", "recall", "accuracy")

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        is_word = prediction.label_ids != IGNORED
        if self.names == ("accuracy",):
            answers, truth = prediction.predictions[is_word], prediction.label_ids[is_word]
        else:
            answers, truth = (
                [[self.tags[tag] for tag in row[kept]] for row, kept in zip(rows, is_word)]
                for rows in (prediction.predictions, prediction.label_ids)
            )
        scores = self.metric.compute(predictions=answers, references=truth)
        return {name: 100 * scores[name] for name in self.names}


if __name__ == "__main__":
    run_script(main)
