"""Teach a decoder to prefer one answer to another, by direct preference optimisation (arXiv:2305.18290) through trl.

    python finetune/dpo.py --config configs/recipes/preferences.yaml --model runs/descriptions
    python finetune/dpo.py --model path/to/SmolLM2 --train_files pairs.jsonl --eval_files test.jsonl --use_peft true --beta 0.1

Each line of such a file has `prompt`, `chosen` and `rejected`. The model that training starts from is the reference; under
LoRA it is the model without its adapter.

trl computes this loss itself: label smoothing and z-loss play no part in it, and a model with experts is refused unless its
routers may go without their balance loss (`--balance_experts false`).

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from variform.hub.cards import Figure
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.splits import facts, load_data
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.trainers import Budgeted


class SafeDPOTrainer(Budgeted, DPOTrainer):
    """trl's Trainer, which loses nothing, and counts held-out pairs one by one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if "ref" in getattr(self.model, "peft_config", {}):
            # A copy of the adapter as it is now: of a run that goes on, or is judged again, not what it began with. Without
            # the copy, trl takes the model under the adapter.
            self.model.delete_adapter("ref")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As trl's; but that takes the mean of the means of batches, of which the last has fewer pairs."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            for values in self._metrics["eval"].values():
                values += values[-1:] * (len(inputs["input_ids"]) // 2 - 1)  # rows are chosen and rejected answers
        return result

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All pairs for each process: what fills up the last batch of several would count twice in trl's means."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(pairs, self.args.eval_batch_size, collate_fn=self.data_collator)


@dataclass
class PreferenceConfig(DPOConfig):
    """trl's own arguments: `beta`, `loss_type`, `max_length` and the like. Models are loaded here, as `ModelArguments` say."""

    trust_remote_code: bool = field(default=False, init=False)
    balance_experts: bool = field(
        default=True,
        metadata={
            "help": "Refuse a mixture of experts, whose balance trl leaves out; with false, its config gives it up."
        },
    )


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [DataArguments, ModelArguments, LoraArguments, RunArguments, PreferenceConfig]
    # trl would take half precision, and compute everything twice to save memory, without being asked
    plain = defaults(bf16="false", gradient_checkpointing="false")
    source, start, lora, options, training = parse_recipe(parts, argv, defaults=plain, description=__doc__)
    if start.form is not None:
        raise ValueError("`form`: preferences are learned by a model that can write already; give `model`.")
    run = Run(options, training, script=__file__, argv=argv, others=[source, start, lora], counts_tokens=False)
    tokenizer = load_tokenizer(start, run.trained)
    if tokenizer.eos_token is None:
        raise ValueError("`tokenizer` has no `eos_token`: answers would have no end.")
    auto_class = AutoModelForCausalLM
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    if not training.balance_experts:
        model.config.router_aux_loss_coef = 0.0
    elif model.config.router_aux_loss_coef > 0:
        raise ValueError(
            f"`router_aux_loss_coef={model.config.router_aux_loss_coef}`: trl would train without the balance loss of the "
            "experts; give it up with `--balance_experts false`."
        )
    check_length(model.config, training.max_length)
    if options.dry_run:
        besides = {} if lora.use_peft else {"reference": model}
        return run.show_plan(model, auto_class, training.max_length, besides=besides)
    data = load_data(source, needs=("prompt", "chosen", "rejected"))
    trainer = run.trainer(
        SafeDPOTrainer,
        model=model,
        ref_model=None if lora.use_peft else build_model(start, auto_class, tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )
    kept = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    run.say(facts(data), {f"{split} dropped": len(data[split]) - len(rows) for split, rows in kept.items()})
    for split, rows in kept.items():
        if not len(rows):
            raise ValueError(
                f"`max_length={training.max_length}` leaves no room for an answer in any pair of `{split}`."
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
            evaluated_on=f"{len(kept['validation']):,} held-out pairs",
            figures=[Figure("accuracy", "pairs in the right order", measured["accuracy"])],
            baselines={"by chance": 50.0},
            data=facts(data),
        ),
    )
    return 0


if __name__ == "__main__":
    run_script(main)
