"""`variform info`: a form on one screen, or what differs between two."""

import argparse
from pathlib import Path

from rich.console import Console, RenderableType

from ..light import light

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
    if len(options.forms) > 2:
        raise ValueError(f"`info` shows one form or compares two, got {len(options.forms)}.")
    if len(options.forms) == 1:
        console.print(describe_one(options.forms[0]))
        return 0
    from ..registration import register
    from ..report.compare import compare
    from .reading import read_form

    register()
    a, b = options.forms
    console.print(compare(read_form(a), read_form(b), names=(a, b), length=options.length))
    return 0


def describe_one(name: str) -> RenderableType:
    """The form on one screen: without torch where that can be, else from the real config, which says what is wrong."""
    try:
        return describe_lightly(name)
    except Exception:  # whatever it is, the real classes judge it
        from ..registration import register
        from ..report.form import describe
        from .reading import read_form

        register()
        return describe(read_form(name), name)


def describe_lightly(name: str) -> RenderableType:
    """The same within tenths of a second, for a form by name, a file or a folder of ours.

    Raises:
        Exception: of any kind, for what only the real classes can read, refuse or count.
    """
    folder = Path(name)
    config = light("forms").load_config(folder / "config.json" if folder.is_dir() else name)
    costs = light("report.arithmetic").count_closed(config)
    return light("report.form").describe(config, name, costs)
