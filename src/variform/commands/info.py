"""`variform info`: a form on one screen, or what differs between two."""

import argparse

from rich.console import Console

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
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace, console: Console) -> int:
    from ..report.compare import compare
    from ..report.form import describe
    from .reading import read_form

    if len(options.forms) > 2:
        raise ValueError(f"`info` shows one form or compares two, got {len(options.forms)}.")
    if len(options.forms) == 1:
        console.print(describe(read_form(options.forms[0]), options.forms[0]))
    else:
        a, b = options.forms
        console.print(compare(read_form(a), read_form(b), names=(a, b), length=options.length))
    return 0
