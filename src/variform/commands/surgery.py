"""`variform surgery`: a checkpoint on disk, native or ours, in another form."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from ..light import light

EXAMPLES = """\
examples:
  variform surgery upcycle my-gpt2 my-moe --num_experts 8 --num_experts_per_tok 2
  variform surgery upcycle my-gpt2 my-moe --num_experts 16 --granularity 2 --layers every:2
  variform surgery sparsify roberta my-longformer --attention_patterns sliding_window:256 \\
      --max_position_embeddings 4096
  variform surgery layout my-moe my-moe-for-lora --experts_layout modulelist

Each prints what it preserves, measured on three sentences. docs/surgery.md explains the operations."""
UPCYCLE = """\
Give a dense model experts in place of its feed-forward networks: copies of them or, with --granularity G, copies of slices
of a G-th of their width. Tokens that use two of eight experts pay for two, and the model can learn in eight.

The result computes what the original does until training parts the experts: their weights are the dense model's own, and a
new router sends different tokens to different copies. Begin with a new optimizer, whose state would not fit."""
SPARSIFY = """\
Let each token see less, and the model read more: sparser attention patterns, longer inputs, or both. On inputs that fit
the patterns, the result computes what the original does. `variform show PATTERN` draws a pattern."""
LAYOUT = """\
Store experts otherwise, bit by bit the same: one tensor for all (fused: fast, expert parallelism), or an nn.Linear each
(modulelist: for LoRA and quantizers that look for those)."""

# What a command line says besides what to change
NOT_CHANGES = ("run", "needs_family", "source", "target", "side")


def add_surgery(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its operations."""
    parser = commands.add_parser(
        "surgery",
        help="change the form of a trained model: experts, patterns, length",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Change the form of a trained model, native or ours; the result is one of ours.",
        epilog=EXAMPLES,
    )
    operations = parser.add_subparsers(title="operations", metavar="OPERATION", required=True)
    add_upcycle(operations)
    add_sparsify(operations)
    layout = add_operation(operations, "layout", "store experts in one tensor, or one by one", LAYOUT)
    layout.add_argument("--experts_layout", choices=["fused", "modulelist"], required=True)


def add_operation(
    operations: argparse._SubParsersAction, name: str, words: str, description: str
) -> argparse.ArgumentParser:
    parser = operations.add_parser(
        name, help=words, formatter_class=argparse.RawDescriptionHelpFormatter, description=description
    )
    parser.add_argument("source", metavar="SRC", help="a folder or a repo on the Hub, of a native model or of ours")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument(
        "--side", choices=["encoder", "decoder"], help="of an encoder-decoder this stack; default: both"
    )
    parser.set_defaults(run=run_surgery)
    return parser


def add_upcycle(operations: argparse._SubParsersAction) -> None:
    parser = add_operation(operations, "upcycle", "experts in place of feed-forward networks", UPCYCLE)
    parser.add_argument("--num_experts", type=int, required=True, metavar="E", help="how many there are")
    parser.add_argument("--num_experts_per_tok", type=int, metavar="K", help="how many a token uses; default: 2 x G")
    parser.add_argument(
        "--granularity", type=int, metavar="G", help="slices of a network; divides E and K; default: 1"
    )
    parser.add_argument(
        "--layers", type=read_layers, metavar="WHICH", help="all (default), every:2, or numbers from 0: 1,3"
    )
    parser.add_argument(
        "--noise", type=float, help="noise on the experts, in standard deviations of a weight: they start only near"
    )
    parser.add_argument("--seed", type=int, help="of routers and noise; default: 0")
    parser.add_argument(
        "--router_type",
        choices=get_args(light("model.expert_fields").RouterType),
        help="how experts are chosen; default: softmax_topk (Mixtral)",
    )
    parser.add_argument("--experts_layout", choices=["fused", "modulelist"], help="default: fused")
    parser.add_argument(
        "--routed_scaling_factor",
        type=float,
        help="of the weights; default: what leaves the experts' weights as they are",
    )
    parser.add_argument(
        "--expert_capacity_factor", type=float, help="room of an expert, in even shares; default: no limit"
    )
    parser.add_argument("--router_aux_loss_coef", type=float, help="of the balance loss; default: 0.01")
    parser.add_argument("--router_z_loss_coef", type=float, help="of the router's z-loss; default: 0")
    parser.add_argument(
        "--inexact",
        dest="is_exact",
        action="store_const",
        const=False,
        help="allow what cannot start as the original, such as expert_choice",
    )


def add_sparsify(operations: argparse._SubParsersAction) -> None:
    parser = add_operation(operations, "sparsify", "sparser attention, longer inputs", SPARSIFY)
    parser.add_argument(
        "--attention_patterns", nargs="+", metavar="PATTERN", help="tiled over the layers; default: as they are"
    )
    parser.add_argument("--max_position_embeddings", type=int, metavar="N", help="longest input in tokens")
    parser.add_argument("--rope_scaling", choices=["dynamic", "linear", "yarn"], help="stretch rotary positions to N")


def read_layers(words: str) -> Any:
    """`"1,3"` as numbers; others as they are, to be judged by `upcycle`."""
    parts = words.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else words


def run_surgery(options: argparse.Namespace, console: Console) -> int:
    from transformers import AutoConfig

    from ..conversion.check import make_inputs
    from ..conversion.checkpoint import refuse_existing, whole_folder
    from ..conversion.convert import bring_along, find_folder, quiet
    from ..reshaping import load, reshape

    target = Path(options.target)
    refuse_existing(target)
    source = find_folder(options.source)
    given = {name: value for name, value in vars(options).items() if value is not None}
    changes = {name: value for name, value in given.items() if name not in NOT_CHANGES}
    if not changes:
        raise ValueError("There is nothing to change: see `--help` for what there is.")
    if options.side is not None:
        of_whole = ("seed", "is_exact", "rope_scaling", "router_aux_loss_coef", "router_z_loss_coef")
        changes = {name: value if name in of_whole else {options.side: value} for name, value in changes.items()}
    with quiet():
        original = load(source, None, for_measuring=True)
        batch, is_text = make_inputs(source, original)
        result, statement = reshape(original, batch=batch, return_statement=True, **changes)
    console.print(statement)
    console.print("" if is_text else "The batch was of random tokens: there is no tokenizer.")
    with whole_folder(target) as temporary:
        bring_along(source, temporary, AutoConfig.from_pretrained(source))
        result.save_pretrained(temporary)
        lengthen_tokenizer(temporary, original.config, result.config)
    console.print(f"Wrote {target}: {type(result).__name__}.")
    return 0


def lengthen_tokenizer(folder: Path, before: Any, after: Any) -> None:
    """Lets a tokenizer that cut texts to the original's longest input cut them to the result's."""
    from ..report.costs import stacks_of

    path = folder / "tokenizer_config.json"
    old = getattr(before.get_text_config(), "max_position_embeddings", None)
    new = min(stack.max_position_embeddings for stack in stacks_of(after).values())
    if not path.is_file() or old is None or new <= old:
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    limit = values.get("model_max_length")
    # RoBERTa's table has two rows that are no positions
    if limit is not None and old - 2 <= limit <= old:
        values["model_max_length"] = new
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
