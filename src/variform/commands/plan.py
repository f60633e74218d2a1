"""`variform plan`: the memory and arithmetic of a training step, before it is run."""

import argparse

from rich.console import Console

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
EXAMPLES = """\
examples:
  variform plan bert-base --batch_size 32 --length 512
  variform plan gpt2 --batch_size 8 --tokens 10B --flops_per_second 100T
  variform plan my-form.yaml --dtype bfloat16 --parallel fsdp2 --processes 8 --gradient_checkpointing
  variform plan switch-base-8 --parallel ep --processes 8

Parameters, gradients and optimizer state are exact. Activations and FLOPs are those of the form's own code,
run without numbers. A device reaches about a third to a half of the FLOPs a second that its sheet says.
docs/scale.md says which layout to take."""


def add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training step takes: memory, FLOPs, days",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What a training step of a form takes, and what fits where: nothing is run, nothing allocated.",
        epilog=EXAMPLES,
    )
    parser.add_argument("form", metavar="FORM", help="a form's name, a YAML file, a folder, or a repo")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N", help="sequences a process and forward")
    parser.add_argument("--length", type=int, metavar="N", help="tokens a sequence; default: by the form")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="forwards a step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all numbers")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd", "adafactor"))
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep the layers' inputs, not the rest")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="devices, one a process")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp2", "tp", "ep", "zero2", "zero3"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="whose kernels")
    parser.add_argument("--tokens", metavar="10B", help="of the whole training: steps and days are worked out")
    parser.add_argument("--flops_per_second", metavar="100T", help="that one device really reaches")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace, console: Console) -> int:
    from ..report.plan import describe, plan
    from .reading import read_form

    tokens = read_amount("--tokens", options.tokens)
    found = plan(
        read_form(options.form),
        batch_size=options.batch_size,
        length=options.length,
        dtype=options.dtype,
        optimizer=options.optimizer,
        gradient_checkpointing=options.gradient_checkpointing,
        accumulation=options.accumulation,
        processes=options.processes,
        parallel=options.parallel,
        tokens=None if tokens is None else round(tokens),
        flops_per_second=read_amount("--flops_per_second", options.flops_per_second),
        device=options.device,
    )
    console.print(describe(found))
    return 0


def read_amount(name: str, word: str | None) -> float | None:
    """`10B` as 10 000 000 000; K, M, B (or G) and T stand for thousands of thousands."""
    if word is None:
        return None
    number, unit = word, 1
    if word[-1:].upper() in (*UNITS, "G"):
        number, unit = word[:-1], UNITS[word[-1].upper().replace("G", "B")]
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"`{name} {word}` must be a number such as 300M, 10B or 1e10.") from None
