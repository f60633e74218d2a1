"""Two builds of the same model, one of transformers and one of Variform: forward, training step, generation, memory."""

import argparse
import sys
from collections.abc import Callable

from _timing import allocated_peak, compare, header, table  # isort: skip (sets the number of threads before torch loads)

import torch

SPEED_TARGET = 0.95
MEMORY_SLACK = 1.03  # masks and positions are made in other shapes
VOCAB, WIDTH, INNER, LAYERS, HEADS = 8192, 384, 1024, 4, 6
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 256, 32, 32
TASKS = ("forward", "training step", "generation")

# Given "transformers" or "variform", builds that library's model; a function of a module, so that a new process finds it
Build = Callable[[str], torch.nn.Module]


def prepare(build: Build, library: str, task: str, dtype: str) -> Callable[[], object]:
    """One run of a task on a fresh model, as a function without arguments."""
    torch.manual_seed(0)
    model = build(library)
    model = model.to(getattr(torch, dtype)).train(task == "training step")
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "labels": ids}
    if task == "forward":
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}

    def forward():
        with torch.no_grad():
            return model(**inputs).logits

    def step():
        model.zero_grad()
        model(**inputs).loss.backward()

    def generate():
        sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return model.generate(
            ids[:, :PROMPT], attention_mask=torch.ones_like(ids[:, :PROMPT]), do_sample=False, **sizes
        )

    return {"forward": forward, "training step": step, "generation": generate}[task]


def calls_a_token(run: Callable[[], object]) -> float:
    """Dispatcher calls of one more decoded token: what the profiler counts, over the tokens decoded."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")) / NEW_TOKENS


def main(description: str, families: dict[str, Build], *, is_bound_by_calls: bool = True) -> int:
    """Measures every family as the command line says, prints the table; 1 if a target is missed.

    Args:
        is_bound_by_calls: more dispatcher calls a decoded token than transformers' are a miss.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(families), default=list(families))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    options = parser.parse_args()
    rows = []
    for family in options.families:
        can_generate = families[family]("variform").can_generate()
        for dtype in options.dtypes:
            for task in TASKS:
                if task != "generation" or can_generate:
                    rows.append(
                        {"model": family, **measure(families[family], task, dtype, options.rounds, is_bound_by_calls)}
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
    print(header())
    print(table(rows))
    return 0 if all(row["met"] == "yes" for row in rows) else 1


def measure(build: Build, task: str, dtype: str, rounds: int, is_bound_by_calls: bool) -> dict[str, str]:
    """One row of the table."""
    runs = {library: prepare(build, library, task, dtype) for library in ("transformers", "variform")}
    timings = compare(runs, rounds)
    calls = {library: calls_a_token(run) if task == "generation" else 0.0 for library, run in runs.items()}
    memory = {library: allocated_peak(run) for library, run in runs.items()}
    speed = timings.speed("variform")
    is_met = (
        speed >= SPEED_TARGET
        and memory["variform"] <= MEMORY_SLACK * memory["transformers"]
        and (calls["variform"] <= calls["transformers"] or not is_bound_by_calls)
    )
    return {
        "dtype": dtype,
        "task": task,
        "speed (transformers = 1)": f"{speed:.2f}",
        "spread": f"{timings.spread('variform'):.2f}",
        "ms": f"{1000 * timings.seconds('variform'):.0f} / {1000 * timings.seconds('transformers'):.0f}",
        "peak MiB": f"{memory['variform']:.1f} / {memory['transformers']:.1f}",
        "calls a token": f"{calls['variform']:.0f} / {calls['transformers']:.0f}" if calls["variform"] else "",
        "met": "yes" if is_met else "NO",
    }
