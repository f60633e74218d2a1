"""`variform show`: which query sees which key; of a text, where a model reads and which experts it takes."""

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
  variform show attention my-model "Time flies like an arrow." --layer 2 --head 0 --out heads.png
  variform show attention my-translator "a source" "its target"
  variform show experts my-moe "Time flies like an arrow." --out experts.png

docs/patterns.md tells what each pattern costs, what its cache keeps, and where it comes from; docs/showing.md, how pictures of
a text are to be read. Attention is not explanation."""
# What `show KIND MODEL TEXT` takes besides, and what pictures of patterns do
OF_TEXTS = ("layer", "head")
OF_PATTERNS = ("length", "is_causal", "heads", "marked", "prefix", "documents")


def add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show",
        help="draw which query sees which key, and what a model does with a text",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw which query sees which key: of patterns, or of the distinct layers of a form.\n"
        "A pattern is written as in a config's `attention_patterns`: NAME:VALUE,OPTION=VALUE,...\n\n"
        "`show attention MODEL TEXT` draws the attention weights of a text (of a pair: SOURCE TARGET), `show experts MODEL\n"
        "TEXT` the experts that its tokens take.",
        epilog="\n".join(["patterns:", *pattern_lines(), "", EXAMPLES]),
    )
    parser.add_argument(
        "subjects",
        metavar="PATTERN|FORM|KIND",
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
    parser.add_argument(
        "--layer", metavar="N", type=int, help="of attention: this layer, from 0; default: all in a file"
    )
    parser.add_argument(
        "--head", metavar="N", type=int, help="of attention: this head, from 0; default: all in a file"
    )
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
    if options.subjects[0] in ("attention", "experts"):
        return show_text(options, console)
    refuse_options(options, OF_TEXTS, "are of `show attention`")
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


def show_text(options: argparse.Namespace, console: Console) -> int:
    """`show attention MODEL TEXT...` and `show experts MODEL TEXT...`."""
    from transformers import AutoTokenizer

    from ..conversion.convert import find_folder
    from ..report.attention_pictures import draw_attention, draw_experts, show_attention, show_experts
    from ..report.pictures import check_path
    from ..report.readings import read_attention, read_experts, tokenize
    from .reading import read_model

    kind, *rest = options.subjects
    if len(rest) < 2:
        raise ValueError(f'`show {kind}` takes a model and a text: `variform show {kind} my-model "Some words."`.')
    refuse_options(options, OF_PATTERNS, "are of patterns")
    refuse_options(options, OF_TEXTS if kind == "experts" else (), "are of `show attention`")
    if options.out is not None:
        check_path(options.out)
    folder = find_folder(rest[0])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    model = read_model(folder)
    text = tokenize(model, tokenizer, rest[1:])
    if kind == "attention":
        attended = read_attention(model, text)
        console.print(show_attention(attended, options.layer, options.head))
        if options.out is not None:
            draw_attention(attended, path=options.out, layer=options.layer, head=options.head)
    else:
        taken = read_experts(model, text)
        console.print(show_experts(taken))
        if options.out is not None:
            draw_experts(taken, path=options.out)
    if options.out is not None:
        console.print(f"Wrote {options.out}.")
    return 0


def refuse_options(options: argparse.Namespace, names: tuple[str, ...], words: str) -> None:
    """Refuses what nothing in the picture would read."""
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        raise ValueError(f"`{', '.join(given)}` {words}: leave them out.")


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
