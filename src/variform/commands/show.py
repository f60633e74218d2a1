"""`variform show`: which query sees which key."""

import argparse
import dataclasses
import difflib
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rich.console import Console

from ..light import light

EXAMPLES = """\
examples:
  variform show sliding_window:8 strided:4 lsh:4
  variform show local_global:4 --global 0,17 --both-ways --out local.png
  variform show chunked:8 --causal --documents 12,6,14
  variform show longformer-base

docs/patterns.md tells what each pattern costs, what its cache keeps, and where it comes from."""


def add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="draw which query sees which key, of patterns or of a form's layers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw which query sees which key: of patterns, or of the distinct layers of a form.\n"
        "A pattern is written as in a config's `attention_patterns`: NAME:VALUE,OPTION=VALUE,...",
        epilog="\n".join(["patterns:", *pattern_lines(), "", EXAMPLES]),
    )
    parser.add_argument(
        "subjects",
        metavar="PATTERN|FORM",
        nargs="+",
        help="a pattern, such as sliding_window:8; or a form: its name, a YAML or JSON file, a folder, or a repo",
    )
    parser.add_argument("--out", metavar="FILE.png", help="write the pictures to a file as well")
    parser.add_argument(
        "--length", metavar="N", type=int, help="tokens of the text; default: 32, or enough for the shape"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--causal", dest="is_causal", action="store_true", default=None, help="as in a decoder alone; default: both"
    )
    ways.add_argument(
        "--both-ways",
        dest="is_causal",
        action="store_false",
        default=None,
        help="as in an encoder alone; default: both",
    )
    parser.add_argument(
        "--heads", metavar="N", type=int, help="heads of a layer, where a pattern parts them; default: 4"
    )
    parser.add_argument(
        "--global", dest="marked", metavar="PLACES", help="marked tokens, such as 0,5, for local_global"
    )
    parser.add_argument(
        "--prefix", metavar="N", type=int, help="tokens of the prefix, for prefix_lm; default: a quarter of the text"
    )
    parser.add_argument("--documents", metavar="LENGTHS", help="pack documents of these lengths, such as 12,6,14")
    parser.set_defaults(run=run_show)


def pattern_lines() -> list[str]:
    """Of each pattern, how it is written, with the defaults of its options in brackets, and what it shows."""
    lines, public_fields = [], light("model.pattern_base").public_fields
    for name, pattern in light("model.patterns").PATTERNS.items():
        first, others = public_fields(pattern)[:1], public_fields(pattern)[1:]
        usage = name + "".join(f":{field.name.upper()}" for field in first)
        usage += f"[,{','.join(f'{field.name}={values_of(field)}' for field in others)}]" if others else ""
        # The docstring up to the source, in which the pattern is written
        about = re.split(r" \(|: `", inspect.cleandoc(pattern.__doc__ or ""))[0].replace("\n", " ")
        lines += [f"  {usage}", f"      {about[:1].lower()}{about[1:]}"]
    return lines


def values_of(field: dataclasses.Field) -> str:
    """The default of a pattern's option and, of a choice, the others, as a string writes them."""
    kind: Any = field.type
    others = [value for value in get_args(kind) if value != field.default] if get_origin(kind) is Literal else []
    return "|".join(str(value).lower() for value in [field.default, *others])


def run_show(options: argparse.Namespace, console: Console) -> int:
    from ..report.pictures import check_path, draw_views, show
    from ..report.views import View, views_of
    from .reading import read_form, read_numbers

    if options.out is not None:
        check_path(options.out)
    views: list[View] = []
    # Patterns together, so that their texts are of one length
    patterns = [name for name in options.subjects if is_pattern(name)]
    forms = [read_form(name) for name in options.subjects if not is_pattern(name)]
    for subject in [patterns] * bool(patterns) + forms:
        views += views_of(
            subject,
            length=options.length,
            is_causal=options.is_causal,
            num_heads=options.heads,
            marked=read_numbers("--global", options.marked),
            prefix=options.prefix,
            documents=read_numbers("--documents", options.documents),
        )
    if options.out is not None:
        draw_views(views, path=options.out)
    console.print(show(views, console.width))
    if options.out is not None:
        console.print(f"Wrote {options.out}.")
    return 0


def is_pattern(name: str) -> bool:
    """Whether a name is rather a pattern's than a form's, misspelt ones too."""
    from ..forms import list_forms
    from ..model.patterns import PATTERNS

    word = name.partition(":")[0]
    if word in PATTERNS:
        return True
    if name in list_forms() or Path(name).exists() or "/" in name:
        return False
    near = difflib.get_close_matches(word, [*PATTERNS, *list_forms()], n=1)
    return ":" in name or near == [] or near[0] in PATTERNS
