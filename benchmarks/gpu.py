"""A training step on a GPU beside transformers' own classes: bfloat16, eager and compiled, sdpa and FlashAttention.

    python benchmarks/gpu.py [--families llama bert t5] [--batch 16] [--length 1024] [--rounds 9]

`--device cpu` runs the same on a processor, to try the script out. Settings that a form or the machine cannot do (T5's
biases with FlashAttention, FlashAttention where it is not installed) are listed with the reason.
"""

import argparse
import statistics
import sys

from _timing import header, table  # isort: skip (sets the number of threads before torch loads)

import torch
from dense import FAMILIES, VOCAB
from torch.utils.benchmark import Timer

SETTINGS = {"sdpa": ("sdpa", False), "sdpa, compiled": ("sdpa", True), "flash": ("flash_attention_2", False)}


def make_step(model: torch.nn.Module, ids: torch.Tensor, backend: str, is_compiled: bool):
    """Forward and backward of a model on one batch, as a function without arguments."""
    model = model.to(ids.device, torch.bfloat16).train()
    model.set_attn_implementation(backend)
    forward = torch.compile(model) if is_compiled else model

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward(input_ids=ids, labels=ids).loss.backward()

    return step


def measure(steps: dict, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each round of each contestant, in turns and after one run; and the peak MiB that each allocates."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory = {}
    on_gpu = torch.cuda.is_available()
    for name, step in steps.items():
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    timers = {name: Timer("step()", globals={"step": step}) for name, step in steps.items()}  # waits for the GPU
    for number in range(rounds):
        for name in sorted(timers, reverse=bool(number % 2)):
            seconds[name].append(timers[name].timeit(1).mean)
    return seconds, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--device", default="cuda", help="where the models run")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contestant")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: pass `--device cpu` to try the script out.", file=sys.stderr)
        return 2
    rows = []
    for family in options.families:
        length = min(options.length, 512) if family == "bert" else options.length  # BERT's table of positions ends
        ids = torch.randint(3, VOCAB, (options.batch, length), device=options.device)
        for setting, (backend, is_compiled) in SETTINGS.items():
            row = {"form": family, "setting": setting, "speed (transformers = 1)": "", "tokens/s": "", "peak MiB": ""}
            try:
                torch.manual_seed(0)
                models = {name: FAMILIES[family](name) for name in ("transformers", "variform")}
                steps = {name: make_step(model, ids, backend, is_compiled) for name, model in models.items()}
            except (ImportError, ValueError) as refusal:
                rows.append({**row, "setting": f"{setting}: {str(refusal).splitlines()[0]}"})
                continue
            seconds, memory = measure(steps, options.rounds)
            ratios = [theirs / ours for theirs, ours in zip(seconds["transformers"], seconds["variform"])]
            row["speed (transformers = 1)"] = f"{statistics.median(ratios):.2f}"
            row["tokens/s"] = f"{ids.numel() / statistics.median(seconds['variform']):,.0f}"
            if memory:
                row["peak MiB"] = f"{memory['variform']:.0f} / {memory['transformers']:.0f}"
            rows.append(row)
    print(header())
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
