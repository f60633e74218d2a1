"""The command `variform`: convert checkpoints, look at forms and patterns."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from .conversion import FAMILIES
from .conversion.check import TOLERANCE, check_conversion
from .conversion.convert import convert_folder, family_of, find_folder, saved_architecture
from .forms import list_forms, load_config
from .model.configuration_variform import AUTO_MAP
from .model.patterns import PATTERNS
from .report.compare import compare
from .report.form import describe
from .report.pictures import View, draw_views, show, views_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if a check failed, 2 for bad input."""
    options = make_parser().parse_args(arguments)
    # rich takes a pipe or a file to be 80 columns wide
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)
    try:
        return options.run(options, console)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="variform", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    converting = commands.add_parser(
        "convert",
        help="convert a checkpoint to Variform, or from it to a native one",
        description="Convert a native checkpoint to Variform, or one of Variform to a native one, exactly.",
    )
    converting.add_argument("source", metavar="SRC", help="a folder or a repo on the Hub")
    converting.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    native = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
    converting.add_argument("--to", metavar="MODEL_TYPE", help=f"a native family: {native}")
    converting.add_argument("--auto-class", help="the head to take, such as AutoModelForMaskedLM; default: as saved")
    converting.add_argument("--check", action="store_true", help="run both models on text and compare them")
    converting.add_argument("--revision", help="branch, tag or commit on the Hub")
    converting.set_defaults(run=run_convert)
    looking = commands.add_parser(
        "info",
        help="show a form, or what differs between two",
        description="Show a form on one screen; of two, what differs and what each difference costs.",
    )
    looking.add_argument("forms", metavar="FORM", nargs="+", help="a form's name, a YAML file, a folder, or a repo")
    looking.add_argument("--length", type=int, help="tokens a sequence, for the operations; default: by the form")
    looking.set_defaults(run=run_info)
    showing = commands.add_parser(
        "show",
        help="draw which query sees which key",
        description="Draw which query sees which key: of patterns, such as sliding_window:8, or of a form's distinct layers.",
    )
    showing.add_argument(
        "subjects", metavar="PATTERN", nargs="+", help="a pattern; or a form's name, a YAML file, a folder, or a repo"
    )
    showing.add_argument("--length", type=int, help="tokens of the text; default: 64, or enough to see the pattern")
    ways = showing.add_mutually_exclusive_group()
    ways.add_argument("--causal", dest="is_causal", action="store_true", default=None, help="as in a decoder")
    ways.add_argument("--both-ways", dest="is_causal", action="store_false", default=None, help="as in an encoder")
    showing.add_argument("--heads", type=int, help="heads of a layer, for patterns that tell them apart; default: 4")
    showing.add_argument("--global", dest="marked", metavar="PLACES", help="marked tokens, such as 0,5: local_global")
    showing.add_argument("--prefix", type=int, default=0, help="first tokens that see each other: prefix_lm")
    showing.add_argument("--png", metavar="FILE", help="write the picture to a file as well")
    showing.set_defaults(run=run_show)
    return parser


def run_convert(options: argparse.Namespace, console: Console) -> int:
    source = find_folder(options.source, revision=options.revision)
    head = {"auto_class": options.auto_class, "show_progress": console.is_terminal}
    converted = convert_folder(source, options.target, to=options.to, **head)
    if converted.config.model_type in AUTO_MAP:
        console.print(describe(converted.config, converted.architecture))
    for name in converted.unused:
        console.print(f"left behind: {name}")
    files = "1 file" if converted.shards == 1 else f"{converted.shards} files"
    console.print(f"Wrote {options.target}: {converted.architecture}, {files} of weights.")
    if not options.check:
        return 0
    check = check_conversion(source, options.target)
    kind = "tokens of text" if check.is_text else "random tokens (there is no tokenizer)"
    for name, difference in check.differences.items():
        console.print(f"{name}: largest difference {difference:.1e} of the largest entry, on {check.tokens} {kind}")
    console.print("The two compute the same." if check.is_exact else f"They differ by more than {TOLERANCE:.0e}.")
    return 0 if check.is_exact else 1


def run_info(options: argparse.Namespace, console: Console) -> int:
    if len(options.forms) > 2:
        raise ValueError(f"`info` shows one form or compares two, got {len(options.forms)}.")
    if len(options.forms) == 1:
        console.print(describe(read_form(options.forms[0]), options.forms[0]))
    else:
        a, b = options.forms
        console.print(compare(read_form(a), read_form(b), names=(a, b), length=options.length))
    return 0


def run_show(options: argparse.Namespace, console: Console) -> int:
    try:
        marked = [int(place) for place in options.marked.split(",")] if options.marked else []
    except ValueError:
        raise ValueError(
            f"`--global {options.marked}` must be places with commas between them, such as 0,5."
        ) from None
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
            marked=marked,
            prefix=options.prefix,
        )
    if options.png is not None:
        draw_views(views, path=options.png)
    console.print(show(views))
    if options.png is not None:
        console.print(f"Wrote {options.png}.")
    return 0


def is_pattern(name: str) -> bool:
    """Whether a name is rather a pattern's than a form's, misspelt ones too."""
    word = name.partition(":")[0]
    if word in PATTERNS:
        return True
    if name in list_forms() or Path(name).exists() or "/" in name:
        return False
    near = difflib.get_close_matches(word, [*PATTERNS, *list_forms()], n=1)
    return ":" in name or near == [] or near[0] in PATTERNS


def read_form(name: str) -> PreTrainedConfig:
    """The form of a name, a file, a folder or a repo on the Hub; that of a native checkpoint as it would be converted."""
    if name in list_forms() or Path(name).is_file():
        return load_config(name)
    if not Path(name).is_dir() and name.count("/") != 1:
        return load_config(name)  # raises, with the nearest name
    config = AutoConfig.from_pretrained(name)
    if config.model_type in AUTO_MAP:
        return config
    family = family_of(config)
    return family.read_form(config, family.auto_class_of(saved_architecture(config)))


if __name__ == "__main__":
    sys.exit(main())
