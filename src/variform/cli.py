"""The command `variform`: one file a command in `commands`, which imports torch only when it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# In the order in which they are listed
COMMANDS = ("info", "plan", "show", "convert", "surgery", "doctor", "publish")
EXAMPLES = """\
examples:
  variform info bert-base                      a form on one screen
  variform info bert-base modernbert-base      what differs, and what each difference costs
  variform plan llama-smollm2-135m --length 1024      memory and arithmetic of a training
  variform show sliding_window:8 strided:4     which query sees which key
  variform show attention my-model "A text."   where the heads read
  variform convert path/to/bert my-bert        a checkpoint, exactly; --check proves it
  variform surgery upcycle my-gpt2 my-moe --num_experts 8      another form of a trained model
  variform doctor my-model                     what is wrong, which kernels run, and why none faster
  variform publish my-run --repo-id me/my-model --dry-run

`variform COMMAND --help` explains a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if a check failed, 2 for bad input."""
    from rich.console import Console

    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    # rich takes a pipe or a file to be 80 columns wide
    console = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)
    try:
        if options.needs_family:
            from .registration import register

            register()
        return options.run(options, console)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="variform",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One Transformer family in every form: look at forms, change them, publish models.",
        epilog=EXAMPLES,
    )
    # `needs_family`: whether the classes must be registered before a command runs, which imports torch
    parser.set_defaults(run=None, needs_family=True)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f".commands.{name}", __package__)
        getattr(command, f"add_{name}")(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
