"""Teach an encoder or a decoder to find the answer to a question in a text (extractive question answering).

    python finetune/answer.py --config configs/recipes/answers.yaml
    python finetune/answer.py --model path/to/bert --train_files train.jsonl --eval_files test.jsonl --use_peft true

Each line of such a file has `question`, `context` and `answers`, the latter as in SQuAD:
`{"text": [...], "answer_start": [...]}`. Texts longer than `max_length` are read in windows that overlap.

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, TrainingArguments

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import best_answers, tokenize_questions
from variform.training.evaluation.baselines import frequent_name_answers
from variform.training.evaluation.metrics import load_metric
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.trainers import SafeTrainer


@dataclass
class AnsweringArguments:
    """What this task needs besides."""

    max_length: int = field(
        default=256, metadata={"help": "Tokens of a window: the question and a piece of the text."}
    )
    stride: int = field(default=64, metadata={"help": "Tokens that a window shares with the one before."})
    max_answer_tokens: int = field(default=30, metadata={"help": "Longer answers are not given."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [AnsweringArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    task, source, start, lora, options, training = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    training.label_names = ["start_positions", "end_positions"]
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    tokenizer = load_tokenizer(start, run.trained)
    auto_class = AutoModelForQuestionAnswering
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length)
    data = load_data(source, needs=("question", "context", "answers"))
    windows = tokenize_questions(
        data, tokenizer, max_length=task.max_length, stride=task.stride, vocab_size=model.config.vocab_size
    )
    run.say(facts(data), windows.report)
    trained_on = ["input_ids", "start_positions", "end_positions"]
    trainer = run.trainer(
        SafeTrainer,
        model=model,
        train_dataset=windows.data["train"].select_columns(trained_on),
        eval_dataset=windows.data["validation"].select_columns(trained_on),
        processing_class=tokenizer,
        bucket_by=("input_ids",),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if not run.train(trainer):
        return STOPPED
    judged = data["validation"]
    begins, ends = trainer.predict(trainer.eval_dataset).predictions[:2]
    answers = best_answers(judged, windows.data["validation"], begins, ends, max_answer_tokens=task.max_answer_tokens)
    measured = score(answers, judged["answers"])
    others = frequent_name_answers(data)
    run.show_scores("Exactly the answer, % of held-out questions", {"this model": measured["exact_match"], **others})
    run.finish(
        trainer,
        {**measured, "baselines": others},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Finds answers in a text: {measured['exact_match']:.1f} % exactly, on questions it has never seen.",
            example=(judged["question"][0], judged["context"][0]),
            dataset=source.dataset or "files",
            evaluated_on=f"{len(judged):,} held-out questions",
            figures=[
                Figure("exact_match", "exact match", measured["exact_match"]),
                Figure("f1", "F1 of the words", measured["f1"]),
            ],
            baselines=others,
            data=facts(data),
        ),
    )
    return 0


def score(answers: list[str], truth: list[dict]) -> dict[str, float]:
    """Exact match and F1 in %, as SQuAD defines them."""
    return load_metric("squad").compute(predictions=answers, references=[row["text"] for row in truth])


if __name__ == "__main__":
    run_script(main)
