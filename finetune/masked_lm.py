"""Train an encoder to fill in masked tokens: pretraining from a form, or going on from a checkpoint.

    python finetune/masked_lm.py --config configs/recipes/reviews_masked.yaml
    python finetune/masked_lm.py --model path/to/bert --train_files 'notes/*.txt' --eval_files test.txt
    torchrun --nproc_per_node 2 finetune/masked_lm.py --config configs/recipes/reviews_masked.yaml

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoModelForMaskedLM, TrainingArguments

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.masking import MaskingCollator, count_hits, mask_once, masked_scores
from variform.training.data.packing import PackedDataset, PackedOrPlain, PackingCollator
from variform.training.data.span_corruption import SetEpoch
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_masked
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.sweep import is_swept, sweep
from variform.training.trainers import SafeTrainer


@dataclass
class MaskingArguments:
    """What this task needs besides."""

    max_length: int = field(default=256, metadata={"help": "Tokens of an example."})
    join_texts: bool = field(default=False, metadata={"help": "Join texts and cut them into blocks of `max_length`."})
    rows: Literal["pad", "pack"] = field(
        default="pad",
        metadata={"help": "Whether a row of a batch is one text, filled up, or several that do not see each other."},
    )
    masked: float = field(default=0.15, metadata={"help": "The part of the tokens that are to be filled in."})

    def __post_init__(self):
        if self.join_texts and self.rows == "pack":
            raise ValueError(
                "`join_texts` fills rows with texts that see each other, and `rows: pack` keeps them apart."
            )


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [MaskingArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    parsed = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    task, source, start, lora, options, training = parsed
    if is_swept(options):
        return sweep(main, argv, parsed, length="max_length")
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    tokenizer = load_tokenizer(start, run.trained)
    collator = MaskingCollator(tokenizer, task.masked, training.seed)
    auto_class = AutoModelForMaskedLM
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length)
    data = load_data(source, needs=("text",))
    vocab_size = model.config.vocab_size
    examples = tokenize_masked(
        data, tokenizer, max_length=task.max_length, blocks=task.join_texts, vocab_size=vocab_size
    )
    run.say(facts(data), examples.report)
    train_on, collate = examples.data["train"], collator
    if task.rows == "pack":
        train_on = PackedDataset(train_on, task.max_length, seed=training.seed)
        run.say({"packed": train_on.facts()}, {})
        collate = PackedOrPlain(PackingCollator(model.config, task.max_length, masking=collator.hide), collator)
    trainer = run.trainer(
        SafeTrainer,
        model=model,
        train_dataset=train_on,
        eval_dataset=mask_once(examples.data["validation"], tokenizer, task.masked, training.seed),
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=[SetEpoch(collator)],
        preprocess_logits_for_metrics=count_hits,
        compute_metrics=masked_scores,
    )
    if not run.train(trainer):
        return STOPPED
    judged = trainer.evaluate()
    measured = {name: judged[f"eval_{name}"] for name in ("accuracy", "perplexity")}
    run.show_scores(f"{task.masked:.0%} of the held-out tokens masked", measured)
    run.finish(
        trainer,
        measured,
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Fills in masked tokens: {measured['accuracy']:.1f} % of those in text it has never seen.",
            example=data["validation"]["text"][0].split(".")[0][:80],  # the snippet masks a token of it
            dataset=source.dataset or "files",
            evaluated_on=f"held-out texts, {task.masked:.0%} of the tokens masked",
            figures=[Figure("accuracy", "masked tokens guessed", measured["accuracy"])],
            data=facts(data),
        ),
    )
    return 0


if __name__ == "__main__":
    run_script(main)
