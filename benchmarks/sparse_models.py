"""Whole sparse models: training steps beside transformers' Longformer and BigBird, and decoding through a window.

    python benchmarks/sparse_models.py [--sections step decode] [--length 4096] [--rounds 5]

One thread, float32. A training step is forward, backward and AdamW of a masked language model of equal sizes on both sides.
Decoding is one token at a time behind a prompt. Exits with 1 if a target is missed.
"""

import argparse
import itertools
import statistics
import sys
import time

from _timing import Timings, allocated_peak, compare, header, table  # isort: skip (sets the number of threads before torch loads)

import torch
import transformers

import variform

VOCAB, WIDTH, LAYERS, HEADS, WINDOW = 4096, 256, 2, 4, 256
SPEED_TARGETS = {"LongformerForMaskedLM": 2.2, "BigBirdForMaskedLM": 2.0}
# The part of the tokens that a masked language model is trained to restore (BERT, arXiv:1810.04805)
MASKED = 0.15
# Between the shortest and the longest prompt, a token may grow dearer by as much (the machine's own scatter)
FLATNESS = 1.15
PROMPTS, DECODED = (1024, 4096, 16384, 32768), 24


def native(name: str, length: int) -> torch.nn.Module:
    """transformers' model, dropout off."""
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "pad_token_id": 0}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "LongformerForMaskedLM":
        config = transformers.LongformerConfig(
            **sizes, **dropouts, max_position_embeddings=length + 2, attention_window=2 * WINDOW
        )
        return transformers.LongformerForMaskedLM(config)
    config = transformers.BigBirdConfig(**sizes, **dropouts, max_position_embeddings=length, block_size=64)
    return transformers.BigBirdForMaskedLM(config)


def form(pattern: str, length: int) -> torch.nn.Module:
    """A post-norm encoder of the same sizes, such as BERT, in which every layer has the pattern."""
    fields = variform.load_config("bert-base").to_dict()
    derived = {"head_dim": None, "embedding_size": None, "num_key_value_heads": None}
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": length, "pad_token_id": 0}
    return variform.from_config(
        {
            **fields,
            **derived,
            **sizes,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "attention_patterns": [pattern],
        }
    )


def training_step(model: torch.nn.Module, length: int, labelled: float):
    """One step on random tokens, of which a part carries labels, as a function without arguments."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(3, VOCAB, (1, length))
    labels = ids.where(torch.rand(1, length) < labelled, -100)

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    return step


def steps(length: int, rounds: int) -> tuple[list[dict[str, str]], bool]:
    """A row or two a peer: our form of its pattern beside it. The target is for labels as masked models have them."""
    rows, is_met = [], True
    patterns = {
        "LongformerForMaskedLM": f"local_global:{WINDOW},global_projections=true",
        "BigBirdForMaskedLM": "big_bird:64",
    }
    for (name, pattern), labelled in itertools.product(patterns.items(), (MASKED, 1.0)):
        runs = {}
        for side, build in (
            ("transformers", lambda name=name: native(name, length)),
            ("variform", lambda p=pattern: form(p, length)),
        ):
            torch.manual_seed(0)
            runs[side] = training_step(build(), length, labelled)
        timings: Timings = compare(runs, rounds)
        memory = {side: allocated_peak(run) for side, run in runs.items()}
        speed = timings.speed("variform")
        met = speed >= SPEED_TARGETS[name] and memory["variform"] < memory["transformers"]
        is_met &= met or labelled != MASKED
        rows.append(
            {
                "peer": name,
                "our pattern": f"`{pattern}`",
                "tokens": f"{length:,}",
                "labels": f"{labelled:.0%}",
                "speed (peer = 1)": f"{speed:.2f}",
                "target": f"{SPEED_TARGETS[name]:.1f}" if labelled == MASKED else "",
                "spread": f"{timings.spread('variform'):.2f}",
                "ms": f"{1000 * timings.seconds('variform'):.0f} / {1000 * timings.seconds('transformers'):.0f}",
                "peak MiB": f"{memory['variform']:.0f} / {memory['transformers']:.0f}",
                "met": ("yes" if met else "no") if labelled == MASKED else "",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, is_met


@torch.no_grad()
def decode(prompts: tuple[int, ...]) -> tuple[list[dict[str, str]], bool]:
    """One row a prompt: process time of a token, and what the cache holds, behind prompts of growing length."""
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    window, states = f"sliding_window:{WINDOW}", {}
    for pattern in (window, "full"):
        longest = max(prompts) + DECODED
        config = variform.VariformDecoderConfig(**sizes, max_position_embeddings=longest, attention_patterns=[pattern])
        model = variform.from_config(config).eval()
        for length in prompts:
            states[pattern, length] = (
                model,
                model(torch.randint(3, VOCAB, (1, length)), use_cache=True, logits_to_keep=1),
            )
    seconds = {key: [] for key in states}
    for pattern in (window, "full"):  # apart: a full cache of 128 MiB leaves the one after it a cold start
        for _ in range(DECODED):  # in turns, so that a slow moment meets all
            for key in [key for key in states if key[0] == pattern]:
                model, output = states[key]
                start = time.process_time()
                token = output.logits[:, -1:].argmax(-1)
                states[key] = model, model(token, past_key_values=output.past_key_values, use_cache=True)
                seconds[key].append(time.process_time() - start)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    held = {
        key: sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers) / 2**20
        for key, (_, output) in states.items()
    }
    rows = [
        {
            "prompt": f"{length:,}",
            "window, ms a token": f"{1000 * medians[window, length]:.2f}",
            "full, ms a token": f"{1000 * medians['full', length]:.2f}",
            "window, cache MiB": f"{held[window, length]:.2f}",
            "full, cache MiB": f"{held['full', length]:.1f}",
        }
        for length in prompts
    ]
    of_window = [medians[window, length] for length in prompts]
    growth = max(of_window) / min(of_window)
    print(f"a token through the window: longest / shortest time {growth:.2f} (at most {FLATNESS})")
    return rows, growth <= FLATNESS and len({held[window, length] for length in prompts}) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=["step", "decode"], default=["step", "decode"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contestant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header())
    all_met = True
    for section in options.sections:
        rows, is_met = steps(options.length, options.rounds) if section == "step" else decode(PROMPTS)
        print(f"\n{section}\n{table(rows)}")
        all_met &= is_met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
