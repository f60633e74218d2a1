"""`variform info`: a form on one screen, or what differs between two."""

import argparse

from rich.console import Console, RenderableType

EXAMPLES = """\
examples:
  variform info bert-base                      a form on one screen
  variform info my-model/config.json
  variform info bert-base modernbert-base      what differs, and what each difference costs"""


def add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="show a form, or what differs between two",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show a form on one screen; of two, what differs and what each difference costs.",
        epilog=EXAMPLES,
    )
    parser.add_argument("forms", metavar="FORM", nargs="+", help="a form's name, a YAML file, a folder, or a repo")
    parser.add_argument("--length", type=int, help="tokens a sequence, for the operations; default: by the form")
    parser.set_defaults(run=run_info, needs_family=False)


def run_info(options: argparse.Namespace, console: Console) -> int:
    from ..light import light, without_torch

    try:
        with without_torch():
            shown = light("commands.info").show(options.forms, options.length)
    except (ValueError, FileNotFoundError):  # of the family's own checks, which are the same ones with torch
        raise
    except Exception:  # whatever it is, the real classes know more
        from ..registration import register

        register()
        shown = show(options.forms, options.length)
    console.print(shown)
    return 0


def show(names: list[str], length: int | None) -> RenderableType:
    """One form on one screen, or what differs between two."""
    from ..report.compare import compare
    from ..report.form import describe
    from .reading import read_form

    if len(names) > 2:
        raise ValueError(f"`info` shows one form or compares two, got {len(names)}.")
    forms = [read_form(name) for name in names]
    if len(forms) == 1:
        return describe(forms[0], names[0])
    return compare(forms[0], forms[1], names=(names[0], names[1]), length=length)
