"""Teach a decoder to prefer one answer to another, by direct preference optimisation (arXiv:2305.18290) through trl.

    python finetune/dpo.py --config configs/recipes/preferences.yaml --model runs/descriptions
    python finetune/dpo.py --model path/to/SmolLM2 --train_files pairs.jsonl --eval_files test.jsonl --use_peft true --beta 0.1

Each line of such a file has `prompt`, `chosen` and `rejected`. The model that training starts from is the reference; under
LoRA it is the model without its adapter.

trl computes this loss itself: losses of routers, label smoothing and z-loss play no part in it.

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data import DataArguments, facts, load_data
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.trainers import Budgeted

MEASURED = {"rewards/accuracies": "pairs in the right order", "rewards/margins": "margin of the rewards"}


class SafeDPOTrainer(Budgeted, DPOTrainer):
    """trl's Trainer, which loses nothing."""


@dataclass
class PreferenceConfig(DPOConfig):
    """trl's own arguments: `beta`, `loss_type`, `max_length` and the like. Models are loaded here, as `ModelArguments` say."""

    trust_remote_code: bool = field(default=False, init=False)


@dataclass
class PreferenceArguments:
    """What this task needs besides."""

    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to go on with at the end."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [PreferenceArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, PreferenceConfig]
    task, source, start, lora, options, training = parse_recipe(parts, argv, defaults=defaults(), description=__doc__)
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora], counts_tokens=False)
    tokenizer = load_tokenizer(start, run.trained)
    auto_class = AutoModelForCausalLM
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    check_length(model.config, training.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, training.max_length)
    data = load_data(source, needs=("prompt", "chosen", "rejected"))
    run.say(facts(data), {})
    trainer = run.trainer(
        SafeDPOTrainer,
        model=model,
        ref_model=None if lora.use_peft else build_model(start, auto_class, tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    if not run.train(trainer):
        return STOPPED
    judged = trainer.evaluate()
    measured = {
        "accuracy": 100 * judged["eval_rewards/accuracies"],
        "margin": judged["eval_rewards/margins"],
    }
    run.show_scores("Held-out pairs in the right order, %", {"this model": measured["accuracy"], "by chance": 50.0})
    run.finish(
        trainer,
        {**measured, "baselines": {"by chance": 50.0}},
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Prefers the better of two answers in {measured['accuracy']:.1f} % of held-out pairs.",
            example=data["validation"]["prompt"][0],
            dataset=source.dataset or "files",
            evaluated_on=f"{len(data['validation']):,} held-out pairs",
            figures=[Figure("accuracy", "pairs in the right order", measured["accuracy"])],
            baselines={"by chance": 50.0},
            data=facts(data),
        ),
    )
    return 0


if __name__ == "__main__":
    run_script(main)
