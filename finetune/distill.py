"""Teach a small model what a large one knows: its predictions, and which tokens its layers find alike.

    python finetune/distill.py --config configs/recipes/distilled_sentiment.yaml --teacher runs/sentiment
    python finetune/distill.py --teacher runs/sentiment --student_layers 0 3 --train_files train.jsonl --eval_files test.jsonl
    python finetune/distill.py --task masked_lm --teacher path/to/bert --dataset movie_reviews --set num_hidden_layers=2 \\
        --form '{model_type: variform_encoder, hidden_size: 128, num_attention_heads: 4}' --soft 0.9 --hidden 1

The teacher is a Variform checkpoint or any that converts; the student is a new form, a checkpoint that goes on, or begins as
some layers of the teacher. Both read the teacher's tokens.

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from variform.conversion.convert import find_folder
from variform.hub.cards import Figure
from variform.hub.paths import model_name
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.masking import MaskingCollator, count_hits, mask_once, masked_scores
from variform.training.data.span_corruption import SetEpoch
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_classes, tokenize_documents, tokenize_masked
from variform.training.data.windows import count_surprise, pad_causal, token_perplexity
from variform.training.distillation import DistillationTrainer, with_labels_of
from variform.training.evaluation.scores import class_scores
from variform.training.lora import LoraArguments
from variform.training.models import (
    build_model,
    check_length,
    check_same_tokens,
    check_vocabulary,
    load_teacher,
    load_tokenizer,
    split_gguf,
)
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.students import student_of

UNITS = {"accuracy": "%", "f1": "%"}
HEADS: dict[str, Any] = {
    "classify": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


@dataclass
class DistillationArguments:
    """What this task needs besides."""

    teacher: str = field(
        metadata={"help": "A checkpoint, of Variform or any that converts, with the head of the task."}
    )
    task: Literal["classify", "masked_lm", "causal_lm"] = field(
        default="classify", metadata={"help": "What the teacher predicts, and the student is to."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of a text; what is longer is cut."})
    masked: float = field(default=0.15, metadata={"help": "Of `masked_lm`, the part of the tokens that are masked."})
    soft: float = field(
        default=0.5, metadata={"help": "From 0, learn from labels alone, to 1, from the teacher alone."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Softens both predictions."})
    hidden: float = field(default=0.0, metadata={"help": "Weight of the likeness of hidden states."})
    student_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Instead of `form` or `model`: the teacher's layers, from 0, that the student begins as."},
    )


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [DistillationArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    task, source, start, lora, options, training = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    auto_class = HEADS[task.task]
    folder = find_folder(split_gguf(task.teacher)[0])  # one that is not there is named before its tokenizer is missed
    start.tokenizer = start.tokenizer or task.teacher
    tokenizer = load_tokenizer(start, run.trained)
    data = load_data(source, needs=("text", "label") if task.task == "classify" else ("text",))
    known, fields = facts(data), dict[str, Any]()
    if task.task == "classify":
        data, fields = with_labels_of(AutoConfig.from_pretrained(folder), data)
    teacher = load_teacher(task.teacher, auto_class)
    check_length(teacher.config, task.max_length)
    check_vocabulary(teacher.config, tokenizer)
    check_same_tokens(task.teacher, tokenizer, "teacher")
    check_same_tokens(start.model, tokenizer, "model")
    if task.task != "classify" and start.form:
        fields["vocab_size"] = teacher.config.vocab_size  # there may be more ids than tokens
    if task.student_layers and (start.form or start.model or lora.use_peft):
        raise ValueError("`student_layers` makes the student: leave `form`, `model` and `use_peft` out.")
    if task.student_layers and run.trained is None:
        model = student_of(teacher, task.student_layers)
    else:
        model = build_model(
            start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run, **fields
        )
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length, besides={"teacher": teacher})
    examples, judging = make_examples(task, data, tokenizer, model.config.vocab_size, training.seed)
    run.say(known, examples.report)
    trainer = run.trainer(
        DistillationTrainer,
        model=model,
        teacher=teacher,
        soft=task.soft,
        temperature=task.temperature,
        hidden=task.hidden,
        train_dataset=examples.data["train"],
        eval_dataset=examples.data["validation"],
        processing_class=tokenizer,
        bucket_by=("input_ids",),
        callbacks=[SetEpoch(judging["data_collator"])] if task.task == "masked_lm" else [],
        **judging,
    )
    if not run.train(trainer):
        return STOPPED
    measured = scores_of(trainer)
    others = {f"teacher, {name}": value for name, value in scores_of(taught(trainer, teacher, judging)).items()}
    sizes = {"teacher_parameters": teacher.num_parameters()}
    came_from = f"layers {', '.join(map(str, task.student_layers))} of {model_name(task.teacher)}"
    run.show_scores("Held-out texts", {**{f"student, {name}": value for name, value in measured.items()}, **others})
    run.finish(
        trainer,
        {**measured, "baselines": others, **sizes},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"A small model that learned from one of {teacher.num_parameters():,} parameters.",
            example=data["validation"]["text"][0],
            dataset=source.dataset or "files",
            evaluated_on=f"{len(data['validation']):,} held-out texts",
            figures=[Figure(name, name, value, unit=UNITS.get(name, "")) for name, value in measured.items()],
            baselines={"the teacher": next(iter(others.values()))},
            base_model=came_from if task.student_layers else model_name(start.model or ""),
            data=known,
        ),
    )
    return 0


def make_examples(
    task: DistillationArguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seed: int
) -> tuple:
    """The examples of the task, and what makes batches of them and judges answers, as arguments of a Trainer."""
    options = {"max_length": task.max_length, "vocab_size": vocab_size}
    if task.task == "classify":
        examples = tokenize_classes(data, tokenizer, **options)
        return examples, {"data_collator": DataCollatorWithPadding(tokenizer), "compute_metrics": class_scores}
    if task.task == "masked_lm":
        examples = tokenize_masked(data, tokenizer, **options)
        examples.data["validation"] = mask_once(examples.data["validation"], tokenizer, task.masked, seed)
        collator, count, judge = MaskingCollator(tokenizer, task.masked, seed), count_hits, masked_scores
    else:
        examples = tokenize_documents(data, tokenizer, starts=True, **options)
        collator, count, judge = pad_causal, count_surprise, token_perplexity
    return examples, {"data_collator": collator, "preprocess_logits_for_metrics": count, "compute_metrics": judge}


def scores_of(trainer: Trainer) -> dict[str, float]:
    """What the task measures."""
    left_out = ("loss", "runtime", "per_second", "preparation_time")
    judged = {
        name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if name.startswith("eval_")
    }
    return {name: value for name, value in judged.items() if not name.endswith(left_out)}


def taught(trainer: Trainer, teacher: Any, judging: dict[str, Any]) -> Trainer:
    """A Trainer that judges the teacher as the student is judged."""
    judge = Trainer(
        model=teacher,
        args=copy.copy(trainer.args),
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        **judging,
    )
    judge.remove_callback(PrinterCallback)
    return judge


if __name__ == "__main__":
    run_script(main)
