"""Train a decoder to write on: pretraining on texts from a form, or going on from a checkpoint; judged by bits per byte.

    python finetune/causal_lm.py --config configs/recipes/long_text.yaml
    python finetune/causal_lm.py --config configs/recipes/long_text.yaml --output_dir runs/sliding \\
        --set 'attention_patterns=[sliding_window:256, sliding_window:256, sliding_window:256, full]'
    python finetune/causal_lm.py --model path/to/SmolLM2 --train_files notes.jsonl --eval_files test.jsonl --use_peft true
    torchrun --nproc_per_node 2 finetune/causal_lm.py --config configs/recipes/long_text.yaml --parallel fsdp2

Whatever a recipe says as `name: value` can be given as `--name value`, which then wins.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

from variform.hub.cards import Figure
from variform.report.costs import count_costs
from variform.training.arguments import parse_recipe
from variform.training.data.arguments import DataArguments
from variform.training.data.packing import PackedDataset, PackedOrPlain, PackingCollator
from variform.training.data.splits import facts, load_data
from variform.training.data.tokenizing import tokenize_documents
from variform.training.data.windows import BitsPerByte, TokenWindows, count_surprise, encode, pad_causal
from variform.training.evaluation.compression import compress
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_tokenizer
from variform.training.options import ModelArguments, RunArguments
from variform.training.reload import prove_reload
from variform.training.run import STOPPED, Run, defaults, run_script
from variform.training.sharded import train_sharded
from variform.training.sweep import is_swept, sweep
from variform.training.trainers import SafeTrainer


@dataclass
class TextArguments:
    """What this task needs besides."""

    max_length: int = field(default=1024, metadata={"help": "Tokens of a window, in training and when judging."})
    rows: Literal["join", "pack", "pad"] = field(
        default="join",
        metadata={
            "help": "What a row of a batch holds: texts joined and cut into windows; whole texts that do not see each other; "
            "or one text, filled up. The latter two cut texts at `max_length`."
        },
    )
    eval_stride: int | None = field(
        default=None,
        metadata={"help": "Tokens that a window scores when judging; all before are context. Default: half of it."},
    )
    parallel: Literal["ddp", "fsdp2", "tp", "ep"] = field(
        default="ddp",
        metadata={
            "help": "What several processes share: the batch alone, or the weights too, by a plain loop, on CPUs as well."
        },
    )
    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to go on with at the end."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens to go on with."})


def main(argv: list[str]) -> int:
    """Run the recipe; returns the exit status."""
    parts = [TextArguments, DataArguments, ModelArguments, LoraArguments, RunArguments, TrainingArguments]
    parsed = parse_recipe(parts, argv, defaults=defaults(sample_by="document"), description=__doc__)
    task, source, start, lora, options, training = parsed
    if is_swept(options):
        return sweep(main, argv, parsed, length="max_length")
    run = Run(options, training, script=__file__, argv=argv, others=[task, source, start, lora])
    tokenizer = load_tokenizer(start, run.trained)
    auto_class = AutoModelForCausalLM
    model = build_model(start, auto_class, tokenizer, lora=lora, trained=run.trained, on_meta=options.dry_run)
    check_length(model.config, task.max_length)
    if options.dry_run:
        return run.show_plan(model, auto_class, task.max_length)
    model.generation_config.max_new_tokens = task.max_new_tokens
    data = load_data(source, needs=("text",))
    run.say(facts(data), {})
    train_on, collator = make_rows(task, data, tokenizer, model.config, run)
    if task.parallel != "ddp":
        if task.rows != "join":
            raise ValueError(f"`parallel={task.parallel}` needs `rows: join`, whose examples are all of one length.")
        if task.prompts:
            raise ValueError("`prompts` are gone on with by one process: finetune/generate.py, with the whole model.")
        parts = (model, tokenizer, train_on, collator, auto_class)
        whole = train_sharded(task.parallel, training, *parts, options=options, say=run.console.print)
        run.console.print(
            f"The whole model is in {whole}. Judge it in one process: finetune/evaluate.py --model {whole}"
        )
        return 0
    held_out = data["validation"]["text"]
    stride = task.max_length // 2 if task.eval_stride is None else task.eval_stride
    judged = TokenWindows([encode([text], tokenizer) for text in held_out], context=task.max_length, stride=stride)
    trainer = run.trainer(
        SafeTrainer,
        model=model,
        train_dataset=train_on,
        eval_dataset=judged,
        processing_class=tokenizer,
        data_collator=collator,
        preprocess_logits_for_metrics=count_surprise,
        compute_metrics=BitsPerByte(sum(len(text.encode()) for text in held_out)),
    )
    if not run.train(trainer):
        return STOPPED
    scores = trainer.evaluate()
    passes = 2 if hasattr(model, "peft_config") else 3  # backward costs two forwards, or one where weights stay
    others = without_adapters(trainer, judged) | compress(data["train"]["text"], held_out)
    measured = {
        "bits_per_byte": scores["eval_bits_per_byte"],
        "baselines": others,
        "max_length": task.max_length,
        "smallest_context": task.max_length - stride,
        "flops_per_token": passes * count_costs(model.config, task.max_length).flops,
    }
    note = f"each token from {measured['smallest_context']:,} before it or more"
    run.show_scores(
        "Bits per byte of held-out text", {"this model": measured["bits_per_byte"], **others}, digits=3, note=note
    )
    if task.prompts and trainer.is_world_process_zero():
        go_on(run, trainer.model, tokenizer, task)
    run.finish(
        trainer,
        measured,
        lambda: run.card(
            trainer,
            auto_class=auto_class,
            summary=f"Writes text on: {measured['bits_per_byte']:.3f} bits per byte of text it has never seen.",
            example=(task.prompts or [held_out[0][:40].rpartition(" ")[0] or held_out[0][:40]])[0],
            dataset=source.dataset or "files",
            evaluated_on="held-out texts",
            figures=[Figure("bits_per_byte", "bits per byte", measured["bits_per_byte"], unit="bits per byte")],
            baselines=others,
            data={**facts(data), "how it was judged": f"every token once, {note} or all of its text"},
        ),
    )
    return 0


def make_rows(
    task: TextArguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, config: Any, run: Run
) -> tuple:
    """The rows to train on, and what makes batches of them."""
    if task.rows == "join":
        stream = encode(data["train"]["text"], tokenizer, ends=True)
        return TokenWindows([stream], context=task.max_length, stride=task.max_length - 1), pad_causal
    options = {"max_length": task.max_length, "vocab_size": config.vocab_size, "starts": True}
    documents = tokenize_documents(data, tokenizer, **options)
    run.say({}, documents.report)
    if task.rows == "pad":
        return documents.data["train"], pad_causal
    packed = PackedDataset(documents.data["train"], task.max_length, seed=run.training.seed)
    run.say({"packed": packed.facts()}, {})
    return packed, PackedOrPlain(PackingCollator(config, task.max_length), pad_causal)


def without_adapters(trainer: Any, judged: TokenWindows) -> dict[str, float]:
    """Bits per byte of what LoRA began with, as a baseline; empty where a whole model was trained."""
    if not hasattr(trainer.model, "peft_config"):
        return {}
    with trainer.model.disable_adapter():
        return {"without adapters": trainer.predict(judged).metrics["test_bits_per_byte"]}


def go_on(run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, task: TextArguments) -> None:
    """Print how prompts go on, and that the saved model says the same in new processes; adapters alone are no model there."""
    tokenizer.padding_side = "left"
    batch = tokenizer(task.prompts, padding=True, return_tensors="pt").to(model.device)
    answers = tokenizer.batch_decode(model.eval().generate(**batch), skip_special_tokens=True)
    for answer in answers:
        run.console.print(f"\n{answer}\n")
    # What a new process writes is as long as the saved config says, which a run that is only judged again may not be told
    if not hasattr(model, "peft_config") and saved_length(run.folder) == task.max_new_tokens:
        prove_reload(run.folder, task.prompts, answers, console=run.console, auto_class="AutoModelForCausalLM")


def saved_length(folder: Path) -> int | None:
    """Tokens that a saved model goes on with by itself."""
    return GenerationConfig.from_pretrained(folder).max_new_tokens


if __name__ == "__main__":
    run_script(main)
