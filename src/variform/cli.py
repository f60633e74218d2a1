"""The command `variform`: convert checkpoints, change their form, look at forms and patterns."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from .conversion import FAMILIES
from .conversion.check import TOLERANCE, check_conversion
from .conversion.convert import convert_folder, family_of, find_folder, saved_architecture
from .forms import list_forms, load_config
from .model.configuration_variform import AUTO_MAP
from .model.pattern_base import public_fields
from .model.patterns import PATTERNS
from .report.compare import compare
from .report.form import describe
from .report.pictures import check_path, draw_views, show
from .report.views import View, views_of
from .surgery_commands import add_surgery

EXAMPLES = """\
examples:
  variform info bert-base                      a form on one screen
  variform info bert-base modernbert-base      what differs, and what each difference costs
  variform show sliding_window:8 strided:4     which query sees which key
  variform convert path/to/bert my-bert        a checkpoint, exactly; --check proves it
  variform surgery upcycle my-gpt2 my-moe --num_experts 8      another form of a trained model

`variform COMMAND --help` explains a command."""
SHOW_EXAMPLES = """\
examples:
  variform show sliding_window:8 strided:4 lsh:4
  variform show local_global:4 --global 0,17 --both-ways --out local.png
  variform show chunked:8 --causal --documents 12,6,14
  variform show longformer-base

docs/patterns.md tells what each pattern costs, what its cache keeps, and where it comes from."""


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
    parser = argparse.ArgumentParser(
        prog="variform",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert checkpoints, change their form, look at forms, draw attention patterns.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_convert(commands)
    add_info(commands)
    add_show(commands)
    add_surgery(commands)
    return parser


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint to Variform, or from it to a native one",
        description="Convert a native checkpoint to Variform, or one of Variform to a native one, exactly.",
    )
    parser.add_argument("source", metavar="SRC", help="a folder or a repo on the Hub")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    native = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
    parser.add_argument("--to", metavar="MODEL_TYPE", help=f"a native family: {native}")
    parser.add_argument("--auto-class", help="the head to take, such as AutoModelForMaskedLM; default: as saved")
    parser.add_argument("--check", action="store_true", help="run both models on text and compare them")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.set_defaults(run=run_convert)


def add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="show a form, or what differs between two",
        description="Show a form on one screen; of two, what differs and what each difference costs.",
    )
    parser.add_argument("forms", metavar="FORM", nargs="+", help="a form's name, a YAML file, a folder, or a repo")
    parser.add_argument("--length", type=int, help="tokens a sequence, for the operations; default: by the form")
    parser.set_defaults(run=run_info)


def add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="draw which query sees which key, of patterns or of a form's layers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw which query sees which key: of patterns, or of the distinct layers of a form.\n"
        "A pattern is written as in a config's `attention_patterns`: NAME:VALUE,OPTION=VALUE,...",
        epilog="\n".join(["patterns:", *pattern_lines(), "", SHOW_EXAMPLES]),
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
    lines = []
    for name, pattern in PATTERNS.items():
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


def read_numbers(name: str, words: str | None) -> list[int]:
    """The numbers of an option that takes several; none where it is not given."""
    if words is None:
        return []
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"`{name} {words}` must be whole numbers with commas between them, such as 5,12.") from None


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
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        return load_config(name)  # raises, with the nearest name
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is neither a folder with a config.json nor a repo to be had: {reason}"
        ) from None
    if config.model_type in AUTO_MAP:
        return config
    family = family_of(config)
    return family.read_form(config, family.auto_class_of(saved_architecture(config)))


if __name__ == "__main__":
    sys.exit(main())
