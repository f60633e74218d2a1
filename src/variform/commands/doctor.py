"""`variform doctor`: what is wrong here, or with a model, and which kernels run."""

import argparse
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

EXAMPLES = """\
examples:
  variform doctor                     the environment, and two steps of each shape
  variform doctor my-model            its weights, tokenizer, two steps, and the kernel of each layer
  variform doctor bert-base --length 512

Nothing is written but temporary files. The exit status is 1 when something is wrong."""


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the environment or a model, and say which kernels run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Check the environment, train two steps, and say which kernel computes each layer and why none faster.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a folder, a repo, or a form's name; default: tiny forms"
    )
    parser.add_argument(
        "--length", metavar="N", type=int, default=512, help="tokens of the text that the kernels read; default: 512"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU where there is one")
    parser.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace, console: Console) -> int:
    import torch

    from ..report.checkup import Finding, look_at_environment

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.length < 1:
        raise ValueError(f"`--length {options.length}` must be at least 1 token.")
    verdicts = []

    def say(finding: Finding) -> None:
        style = {"ok": "green", "note": "yellow", "wrong": "bold red"}[finding.verdict]
        console.print(Text(f"{finding.verdict:5}", style), f"{finding.about}: {finding.words}")
        verdicts.append(finding.verdict)

    for finding in look_at_environment():
        say(finding)
    name, length = options.model, options.length
    for finding in look_at_tiny_forms(device) if name is None else look_at_model(name, length, device):
        say(finding)
    wrong = verdicts.count("wrong")
    console.print(f"{wrong} wrong." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0


def look_at_tiny_forms(device: Any) -> Iterator[Any]:
    """Two steps of the smallest form of each shape."""
    from ..forms import SHAPES, from_config
    from ..report.checkup import try_training

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for model_type in SHAPES:
        is_pair = model_type == "variform_encoder_decoder"
        fields = {"encoder": sizes, "decoder": sizes, "decoder_start_token_id": 0} if is_pair else sizes
        yield from try_training(from_config({"model_type": model_type, **fields}).to(device))


def look_at_model(name: str, length: int, device: Any) -> Iterator[Any]:
    """The weights, the tokenizer, the kernels and two steps of a model; of a form by name, those of new weights."""
    from ..conversion.convert import find_folder
    from ..forms import from_config, list_forms
    from ..report.checkup import Finding, look_at_tokenizer, look_at_weights, training_batch, try_training
    from ..report.costs import stacks_of
    from ..report.kernels import kernels_of, why_not_flash
    from .reading import read_model, refuse_adapter

    if name in list_forms():
        model = from_config(name)
    else:
        folder = find_folder(name)
        refuse_adapter(folder)
        yield from look_at_weights(folder)
        try:
            model = read_model(folder)
        except (ValueError, OSError, RuntimeError) as error:
            yield Finding("wrong", "model", f"{folder} does not load: {str(error).splitlines()[0]}")
            return
        yield from look_at_tokenizer(folder, model.config)
    model.to(device)
    for kernel in kernels_of(model, training_batch(model, length)):
        yield Finding("ok", kernel.where, "; ".join(filter(None, (kernel.name, kernel.why))))
    for side, stack in stacks_of(model.config).items():
        if words := why_not_flash(stack, model.device):
            yield Finding("ok", f"{side}, faster", words)
    yield from try_training(model)
