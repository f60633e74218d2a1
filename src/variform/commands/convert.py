"""`variform convert`: a checkpoint from and to native classes."""

import argparse

from rich.console import Console

EXAMPLES = """\
examples:
  variform convert path/to/bert my-bert --check
  variform convert my-llama path/to/native --to mistral

docs/conversion.md has the families, the heads, what is exact and what is refused."""


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint to Variform, or from it to a native one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a native checkpoint to Variform, or one of Variform to a native one, exactly.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SRC", help="a folder or a repo on the Hub")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument(
        "--to", metavar="MODEL_TYPE", help="a native family, such as llama; default: the one that fits"
    )
    parser.add_argument("--auto-class", help="the head to take, such as AutoModelForMaskedLM; default: as saved")
    parser.add_argument("--check", action="store_true", help="run both models on text and compare them")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace, console: Console) -> int:
    from ..conversion.check import TOLERANCE, check_conversion
    from ..conversion.convert import convert_folder, find_folder
    from ..model.configuration_variform import AUTO_MAP
    from ..report.form import describe

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
