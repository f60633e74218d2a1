"""What every script can be told besides `TrainingArguments`: which model, and how its run behaves."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelArguments:
    """The model: a new one of some form, or one to go on from."""

    form: str | None = field(
        default=None,
        metadata={
            "help": "A new model: fields of a config with `model_type`, the name of a form in configs/models, or a YAML "
            "or JSON file. The vocabulary and the special ids are those of the tokenizer."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a form: a checkpoint, of Variform or any that converts (BERT, GPT-2, T5, Llama ...)."
        },
    )
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Changes of the form, FIELD=VALUE; `encoder.num_hidden_layers=2` reaches into a stack. Beside `model`: "
            "of what only training reads, such as `hidden_dropout=0.1`."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "A folder or repo, or `bytes`; default: the one beside `model`. finetune/tokenizer.py trains one."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model` on the Hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code of `model`'s repo; then `revision` must be a commit, 40 hex digits."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As for `from_pretrained`."})
    allow_missing: bool = field(
        default=False,
        metadata={"help": "Start from a checkpoint that lacks weights of the model's body; they are new then."},
    )


@dataclass
class RunArguments:
    """The run: where it begins, when it ends, and what it does when something goes wrong."""

    resume: str = field(
        default="auto",
        metadata={"help": "`auto`: from the newest whole checkpoint in `output_dir`, if any; a path; or `none`."},
    )
    allow_resume_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields that may differ from the checkpoint's; the run is then not the one that was stopped."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Build on the meta device, print parameters, memory, FLOPs and tokens a step, and stop."},
    )
    minutes: float | None = field(
        default=None, metadata={"help": "Train for so long; the learning rate follows the clock instead of the steps."}
    )
    clock: Literal["wall", "process"] = field(
        default="wall", metadata={"help": "What `minutes` counts: `wall`, or `process`, the time on cores."}
    )
    checkpoint_verify: Literal["hash", "size", "full"] = field(
        default="hash",
        metadata={
            "help": "How a checkpoint's files are checked: `hash`, but of files above 2 GB the size; `size`; or `full`."
        },
    )
    on_save_error: Literal["stop", "continue"] = field(
        default="stop", metadata={"help": "What a checkpoint that cannot be written does to the run."}
    )
    max_skipped_steps: int = field(
        default=0,
        metadata={"help": "So many steps in a row without a finite loss or gradient are left out; then it stops."},
    )
    stop_on_divergence: bool = field(
        default=False, metadata={"help": "Stop, not only warn, when the loss stays far above its median."}
    )
    sweep: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=A,B,...: train each combination, at equal FLOPs, and compare: arguments or fields of the form."
        },
    )
