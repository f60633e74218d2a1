"""Packed documents beside padded ones: training steps over the same documents with the same weights.

    python benchmarks/packing.py [--shapes decoder encoder encoder_decoder] [--padding 0.54 0.72] [--rounds 9]

Padded batches run on transformers' own class (Llama, BERT, BART; sdpa), converted from our model, and on our model, which skips
padding in attention. BERT learns 15 % of the tokens. Nothing is timed before losses and gradients agree. Exits with 1 if
packing is not faster than the padded batches of transformers by 2.2 times at 54 % padding and by 4.5 at 72 %.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

from _timing import compare, header, table  # isort: skip (sets the number of threads before torch loads)

import torch

import variform
from variform.training.data.packing import PackedDataset, PackingCollator

VOCAB, WIDTH, LAYERS, HEADS = 4096, 256, 3, 4
SHAPES = ["decoder", "encoder", "encoder_decoder"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Share of padding: documents of a padded batch, tokens of the longest, how many times as fast packing must be
SETTINGS = {0.54: (16, 237, 2.2), 0.72: (24, 512, 4.5)}
MASKED = 0.15  # of an encoder's tokens
BATCHES = 2
TABLE = 4096  # learned positions


def build(shape: str) -> torch.nn.Module:
    """A small Llama, BERT or BART without dropout, in training."""
    stack = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    stack |= {"num_hidden_layers": LAYERS, "max_position_embeddings": TABLE}
    torch.manual_seed(0)
    if shape == "decoder":
        return variform.from_config(variform.VariformDecoderConfig(**stack, **IDS)).train()
    stack |= {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "intermediate_size": 4 * WIDTH,
    }
    stack |= {"head_dim": None, "embedding_size": None, "num_key_value_heads": None}
    if shape == "encoder":
        return variform.from_config(variform.load_config("bert-base").to_dict() | stack).train()
    form = variform.load_config("bart-base").to_dict()
    for side in ("encoder", "decoder"):
        form[side].update(stack)
    form["decoder"]["lm_head_bias"] = True  # a buffer in BART
    return variform.from_config(form).train()


def draw_lengths(padding: float, count: int, longest: int) -> torch.Tensor:
    """`(batches, count)` lengths, the same numbers in each batch: from few tokens to `longest`, most of them short."""
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = 0.01, 100.0  # the larger the exponent, the shorter most documents
    for _ in range(60):
        exponent = (low + high) / 2
        lengths = (places**exponent * longest).round().clamp(min=4)
        low, high = (low, exponent) if 1 - lengths.mean() / longest > padding else (exponent, high)
    generator = torch.Generator().manual_seed(0)
    return torch.stack([lengths.long()[torch.randperm(count, generator=generator)] for _ in range(BATCHES)])


def draw_documents(shape: str, lengths: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Examples of random tokens; targets are as long as sources, give or take a fifth."""
    generator = torch.Generator().manual_seed(1)
    longest, documents = int(lengths.max()), []
    for length in lengths.flatten().tolist():
        example = {"input_ids": torch.randint(3, VOCAB, (length,), generator=generator)}
        if shape == "encoder":
            is_hidden = torch.rand(length, generator=generator) < MASKED
            is_hidden[0] = True
            example["labels"] = example["input_ids"].masked_fill(~is_hidden, -100)
        if shape == "encoder_decoder":
            factor = 0.8 + 0.4 * float(torch.rand((), generator=generator))
            target = longest if length == longest else min(longest, max(2, round(length * factor)))
            example["labels"] = torch.randint(3, VOCAB, (target,), generator=generator)
        documents.append(example)
    return documents


def pack(shape: str, documents: list[dict], longest: int) -> PackedDataset:
    """The documents in rows of the length that they fill best: a whole data set fills rows of any length."""
    sides = [{"max_length": length} for length in range(2 * longest, 5 * longest, 16)]
    if shape == "encoder_decoder":
        sides = [{**side, "max_target_length": side["max_length"]} for side in sides]
    return min(
        (PackedDataset(documents, **side) for side in sides), key=lambda rows: len(rows) * rows.room["max_length"]
    )


def batches(shape: str, config, documents: list[dict], longest: int, per_batch: int) -> dict[str, list[dict]]:
    """The documents in padded batches as they come, and as many batches of packed rows."""
    rows = pack(shape, documents, longest)
    print(f"{shape}: {rows.facts()}", file=sys.stderr)
    found = {}
    for kind, given, size in (
        ("padded", [[document] for document in documents], per_batch),
        ("packed", list(rows), -(-len(rows) // BATCHES)),
    ):
        room = dict(rows.room) if kind == "packed" else dict.fromkeys(rows.room, longest)
        collator = PackingCollator(config, **room)
        found[kind] = [collator(given[start : start + size]) for start in range(0, len(given), size)]
    return found


def make_pass(model: torch.nn.Module, given: list[dict]) -> Callable[[], float]:
    """A function that takes the loss and the gradients of all batches and returns the loss a token."""
    counts = [int((batch["labels"] != -100).sum()) for batch in given]

    def run() -> float:
        model.zero_grad()
        total = 0.0
        for batch, count in zip(given, counts):
            loss = model(**batch).loss * (count / sum(counts))  # not all native classes take `num_items_in_batch`
            loss.backward()
            total += loss.item()
        return total

    return run


def measure(shape: str, padding: float, rounds: int) -> list[dict[str, str]]:
    """The rows of the table of one shape and share of padding.

    Raises:
        AssertionError: if the contestants' losses or gradients differ.
    """
    count, longest, target = SETTINGS[padding]
    model = build(shape)
    documents = draw_documents(shape, draw_lengths(padding, count, longest))
    given = batches(shape, model.config, documents, longest, count)
    # Where positions do not restart, a native class has them itself, by slots as they are here: nothing is padded in front
    plain = [{name: part for name, part in batch.items() if "position_ids" not in name} for batch in given["padded"]]
    native = variform.to_hf(model).train()
    contestants = {
        "padded, transformers": (native, plain),
        "padded": (model, given["padded"]),
        "packed": (model, given["packed"]),
    }
    found = {}
    for name, (own_model, own) in contestants.items():
        loss = make_pass(own_model, own)()
        found[name] = torch.tensor(loss), own_model.get_input_embeddings().weight.grad.clone()
        torch.testing.assert_close(found[name], found["padded, transformers"], rtol=1e-4, atol=1e-6)
    timings = compare({name: make_pass(*contestant) for name, contestant in contestants.items()}, rounds)
    real = [sum(int(batch["attention_mask"].sum()) for batch in given[kind]) for kind in ("padded", "packed")]
    slots = [sum(batch["attention_mask"].numel() for batch in given[kind]) for kind in ("padded", "packed")]
    ratio = slots[0] / real[0]
    over_own = [own / packed for own, packed in zip(timings["padded"], timings["packed"])]
    return [
        {
            "shape": shape,
            "padding": f"{100 * (1 - real[0] / slots[0]):.0f} %",
            "packed rows filled": f"{100 * real[1] / slots[1]:.0f} %",
            "packed (padded, transformers = 1)": f"{timings.speed('packed'):.2f}",
            "target": f"{target}",
            "spread": f"{timings.spread('packed'):.2f}",
            "packed (padded, Variform = 1)": f"{statistics.median(over_own):.2f}",
            "padded / real tokens": f"{ratio:.2f}",
            "ms": " / ".join(f"{1000 * timings.seconds(name):.0f}" for name in contestants),
            "met": "yes" if timings.speed("packed") >= target else "NO",
        }
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument(
        "--padding", nargs="+", type=float, choices=list(SETTINGS), default=list(SETTINGS), help="shares of the slots"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        for padding in options.padding:
            rows += measure(shape, padding, options.rounds)
            print(rows[-1], file=sys.stderr, flush=True)
    print(header(), table(rows), sep="\n\n")
    return 0 if all(row["met"] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
