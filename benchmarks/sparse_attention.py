"""Sparse attention at its cost: time and memory of the block kernel, as texts grow and beside what else computes it.

    python benchmarks/sparse_attention.py [--sections core gpu] [--lengths 512 2048 4096 8192 16384] [--rounds 5]

`core`: one thread, float32, 8 heads of 64 and one row of tokens: a plan, which is made in the first run and then remembered
(that of `lsh` is made each time), forward and backward. `gpu`, where there is one: a causal window of 512 in 32,768 tokens by
FlexAttention and by the block kernel, beside full FlashAttention, in bfloat16. Exits with 1 if a target is missed.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from _timing import Timings, allocated_peak, compare, header, table  # isort: skip (sets the number of threads before torch loads)

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.benchmark import Timer
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from variform.model.block_attention import block_attention
from variform.model.block_plan import BlockPlan, groups_of_text, make_plan
from variform.model.lsh import plan_chunks
from variform.model.pattern_base import Pairs, Text, count_visible, visible_matrix
from variform.model.patterns import parse
from variform.model.sparse_patterns import Lsh

HEADS, HEAD_DIM = 8, 64
WINDOW = 256  # keys on each side, or about twice as many in all
REFORMER_CHUNK = 64  # what Reformer's config has by default: a quarter of the keys that the other patterns see
LENGTHS = (512, 2048, 4096, 8192, 16384)
LONGEST_DENSE, DENSE_ROUNDS = 8192, 3  # a step with a dense mask takes ten seconds there
LONGFORMER, DENSE = "Longformer's core", "sdpa, dense mask"

# Targets; growth is the exponent of time over length
LINEAR_GROWTH = 1.15  # from 2,048 tokens on
SHORTEST_FOR_COST = 4096
SHORTEST_FOR_SPEED = 2048
LONGFORMER_SPEED, LONGFORMER_MEMORY = 5.5, 1 / 8  # of sliding, at every length from there on
DENSE_SPEED, DENSE_MEMORY = 10, 1 / 3  # at 8,192 tokens

GPU_LENGTH, GPU_WINDOW = 32768, 512
FLASH, FLEX, BLOCKS = "FlashAttention, full", "FlexAttention, window", "block kernel, window"


class Case(NamedTuple):
    """What is seen."""

    spec: str
    is_causal: bool = False
    document: int | None = None  # tokens in each of the documents that are packed
    marked: int = 0  # scattered tokens that are global
    is_linear: bool = True
    dearest: float = 1.5  # how many times as much time as sliding's one visible score may take

    def texts(self, length: int) -> list[tuple[Text, int]]:
        """The texts with their first rows."""
        size = min(self.document or length, length)
        marked = tuple((2 * number + 1) * size // (2 * self.marked) for number in range(self.marked))
        return [(Text(size, self.is_causal, marked), first) for first in range(0, length, size)]

    def visible(self, length: int) -> float:
        """Scores that a head needs."""
        if self.is_hashed:
            plan = self.planner(length)(rows(length * HEADS, 1)[1])
            masks = [group.mask for of_round in plan.rounds for part in of_round for group in part.groups]
            return sum(float(mask.seen().sum()) for mask in masks) / HEADS
        texts = [text for text, _ in self.texts(length)]
        return len(texts) * count_visible(parse(self.spec), texts[0], HEADS)

    @property
    def is_hashed(self) -> bool:
        """Whether the plan depends on the keys, so that each head is a text of its own."""
        return isinstance(parse(self.spec), Lsh)

    def planner(self, length: int) -> Callable[[torch.Tensor], BlockPlan]:
        """Makes the plan from the keys' rows."""
        pattern, texts = parse(self.spec), self.texts(length)
        if self.is_hashed:
            return lambda key: plan_chunks(key.detach().view(1, HEADS, length, HEAD_DIM), pattern, 0, self.is_causal)
        return lambda key: make_plan(pattern, texts, num_heads=HEADS)


SLIDING = "sliding"
CASES = {
    SLIDING: Case(f"sliding_window:{WINDOW}"),
    "sliding, causal": Case(f"sliding_window:{WINDOW}", is_causal=True),
    "chunked": Case(f"chunked:{2 * WINDOW}"),
    "packed documents": Case("full", document=2 * WINDOW),
    "local_global": Case(f"local_global:{WINDOW}", marked=16),
    "big_bird": Case("big_bird:64,random=3"),
    "lsh": Case(f"lsh:64,chunked=true,chunk={WINDOW}", dearest=2.5),
    # Nearly half of what its tiles compute is the future, wherever the sort put it
    "lsh, causal": Case(f"lsh:64,chunked=true,chunk={WINDOW}", is_causal=True, dearest=2.5),
    # For information: so few keys hardly pay for sorting a row
    "lsh, small chunks": Case(f"lsh:64,chunked=true,chunk={REFORMER_CHUNK}", dearest=math.inf),
    "lsh, small chunks, causal": Case(f"lsh:64,chunked=true,chunk={REFORMER_CHUNK}", is_causal=True, dearest=math.inf),
    "dilated": Case(f"dilated:{WINDOW},gap=4", is_linear=False, dearest=2.5),
    "strided, causal": Case("strided:128", is_causal=True, is_linear=False, dearest=2.5),
    "fixed, causal": Case("fixed:128", is_causal=True, is_linear=False, dearest=2.5),
}


class Given(nn.Module):
    """In place of a projection: the states `(n, 1, heads * head_dim)` that it would have made."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.states.clone()  # which is divided in place


def rows(length: int, heads: int = HEADS) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, `(length, heads, head_dim)`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, heads, HEAD_DIM, generator=generator).requires_grad_(i < 3) for i in range(4)]


def block_step(case: Case, length: int) -> Callable[[], Any]:
    """A plan, forward and backward by the block kernel."""
    *states, grad = rows(length * HEADS, 1) if case.is_hashed else rows(length)
    make = case.planner(length)
    return lambda: torch.autograd.grad(block_attention(*states, make(states[1]), scaling=HEAD_DIM**-0.5), states, grad)


def longformer_step(length: int) -> Callable[[], Any]:
    """Forward and backward of transformers' sliding window, its projections replaced by their results."""
    config = LongformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    attention = LongformerSelfAttention(config, layer_id=0)
    *states, grad = (states.flatten(1)[:, None] for states in rows(length))
    states = [part.detach().requires_grad_() for part in states]
    attention.query, attention.key, attention.value = (Given(part) for part in states)
    hidden, nothing = torch.zeros(1, length, HEADS * HEAD_DIM), torch.zeros(1, length)
    options = {"is_index_masked": nothing.bool(), "is_index_global_attn": nothing.bool(), "is_global_attn": False}
    return lambda: torch.autograd.grad(attention(hidden, nothing, **options)[0], states, grad.transpose(0, 1))


def dense_step(length: int) -> Callable[[], Any]:
    """Forward and backward of torch's attention with the sliding window as a boolean mask."""
    *states, grad = (states[None].transpose(1, 2) for states in rows(length))
    states = [part.detach().requires_grad_() for part in states]
    mask = visible_matrix(parse(CASES[SLIDING].spec), Text(length, is_causal=False))
    attend = nn.functional.scaled_dot_product_attention
    return lambda: torch.autograd.grad(attend(*states, attn_mask=mask), states, grad)


def check() -> None:
    """The three compute the same."""
    length = 2 * 2 * WINDOW
    ours = block_step(CASES[SLIDING], length)()
    for other in (longformer_step(length)(), dense_step(length)()):
        for own, theirs in zip(ours, other):
            theirs = theirs[0].transpose(0, 1) if theirs.ndim == 4 else theirs.view(own.shape)
            torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def first_plan(case: Case, length: int) -> float:
    """Seconds of process time to make a plan that is not remembered."""
    make, key = case.planner(length), rows(length)[1]
    groups_of_text.cache_clear()
    start = time.process_time()
    make(key)
    return time.process_time() - start


def growth(figures: dict[int, float]) -> float:
    """The exponent of figures by length, by least squares of their logarithms; not a number for fewer than two."""
    if len(figures) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in figures], [math.log(y) for y in figures.values()]).slope


class Measured(NamedTuple):
    """All contestants at one length."""

    timings: Timings  # Longformer's core is the baseline
    dense: Timings | None  # the dense mask is the baseline
    memory: dict[str, float]  # MiB
    plans: dict[str, float]  # seconds to make the first plan
    visible: dict[str, float]  # scores that a head needs

    def cost(self, name: str) -> float:
        """Time of a visible score, as a multiple of sliding's."""
        ratios = [own / sliding for own, sliding in zip(self.timings[name], self.timings[SLIDING])]
        return statistics.median(ratios) * self.visible[SLIDING] / self.visible[name]

    def row(self, name: str) -> dict[str, str]:
        """The figures of one contestant, for the table."""
        memory, seconds = self.memory[name], self.timings.seconds(name)
        is_pattern = name in self.visible
        has_dense = self.dense is not None and name == SLIDING
        return {
            "ms": f"{1000 * seconds:.0f}",
            "speed (Longformer = 1)": f"{self.timings.speed(name):.1f}",
            "spread": f"{self.timings.spread(name):.2f}",
            "speed (dense mask = 1)": f"{self.dense.speed(name):.1f}" if has_dense else "",
            "peak MiB": f"{memory:.0f}",
            "of Longformer": f"1/{self.memory[LONGFORMER] / memory:.1f}",
            "of the dense mask": f"1/{self.memory[DENSE] / memory:.1f}" if has_dense else "",
            "cost of a score (sliding = 1)": f"{self.cost(name):.2f}" if is_pattern else "",
            "first plan": f"{self.plans[name] / seconds:.1%}" if is_pattern else "",
        }


def measure(length: int, rounds: int) -> Measured:
    """Times and memory at one length; of texts so short that a window hides little, of sliding alone."""
    cases = {name: case for name, case in CASES.items() if name == SLIDING or length > 2 * WINDOW}
    plans = {name: first_plan(case, length) for name, case in cases.items()}
    runs = {LONGFORMER: longformer_step(length)}
    runs.update({name: block_step(case, length) for name, case in cases.items()})
    timings = compare(runs, rounds)
    dense = None
    if length <= LONGEST_DENSE:
        runs[DENSE] = dense_step(length)
        dense = compare({DENSE: runs[DENSE], SLIDING: runs[SLIDING]}, DENSE_ROUNDS)
    memory = {name: allocated_peak(run) for name, run in runs.items()}
    return Measured(timings, dense, memory, plans, {name: case.visible(length) for name, case in cases.items()})


def misses(measured: dict[int, Measured]) -> list[str]:
    """The targets that are not met, in words."""
    found = []

    def expect(is_met: bool, text: str) -> None:
        if not is_met:
            found.append(text)

    for length, own in measured.items():
        speed, memory = own.timings.speed(SLIDING), own.memory[SLIDING]
        share = memory / own.memory[LONGFORMER]
        if length >= SHORTEST_FOR_SPEED:
            expect(speed >= LONGFORMER_SPEED, f"{length}: sliding is {speed:.1f} times as fast as {LONGFORMER}")
            expect(share <= LONGFORMER_MEMORY, f"{length}: sliding takes {share:.3f} of the memory of {LONGFORMER}")
        if length == LONGEST_DENSE:
            speed, share = own.dense.speed(SLIDING), memory / own.memory[DENSE]
            expect(speed >= DENSE_SPEED, f"{length}: sliding is {speed:.1f} times as fast as {DENSE}")
            expect(share <= DENSE_MEMORY, f"{length}: sliding takes {share:.3f} of the memory of {DENSE}")
        for name in own.visible if length >= SHORTEST_FOR_COST else ():
            cost, limit = own.cost(name), CASES[name].dearest
            expect(cost <= limit, f"{length}: a score of {name} costs {cost:.2f} of sliding's, above {limit}")
    for name, (time_growth, _) in growths(measured).items():
        is_linear = not CASES[name].is_linear or not time_growth > LINEAR_GROWTH
        expect(is_linear, f"the time of {name} grows with exponent {time_growth:.2f}")
    return found


def growths(measured: dict[int, Measured]) -> dict[str, tuple[float, float]]:
    """The exponents of time and of visible scores over the lengths that all patterns have."""
    lengths = [length for length, own in measured.items() if len(own.visible) == len(CASES)]
    return {
        name: (
            growth({n: measured[n].timings.seconds(name) for n in lengths}),
            growth({n: measured[n].visible[name] for n in lengths}),
        )
        for name in CASES
    }


def core(options: argparse.Namespace) -> bool:
    """Attention alone, without projections: prints its tables; whether all targets are met."""
    check()
    measured = {}
    for length in options.lengths:
        measured[length] = measure(length, options.rounds)
        print(f"{length} tokens", measured[length].timings.seconds(SLIDING), file=sys.stderr, flush=True)
    rows = [{"tokens": n, "core": name, **own.row(name)} for n, own in measured.items() for name in own.timings]
    print(table(rows) + "\n")
    exponents = growths(measured).items()
    print(table([{"growth": name, "time": f"{a:.2f}", "visible scores": f"{b:.2f}"} for name, (a, b) in exponents]))
    missed = misses(measured)
    print("\n" + ("\n".join(f"missed: {text}" for text in missed) or "all targets met"))
    return not missed


def window_cores(length: int, window: int, device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Attention of `(1, heads, length, head_dim)` states: full and causal, and the causal window twice."""
    pattern, attend = parse(f"sliding_window:{window}"), torch.compile(flex_attention)
    plan = make_plan(pattern, [(Text(length, is_causal=True), 0)], num_heads=HEADS, device=device)

    def is_seen(batch_idx, head_idx, q_idx, kv_idx):
        return pattern.visible(Pairs(q_idx, kv_idx, length, is_causal=True))

    mask = create_block_mask(is_seen, None, None, length, length, device=device, _compile=True)

    def flash(query, key, value):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def blocks(query, key, value):
        of_rows = (states[0].transpose(0, 1) for states in (query, key, value))
        return block_attention(*of_rows, plan, scaling=HEAD_DIM**-0.5).transpose(0, 1)[None]

    return {FLASH: flash, FLEX: lambda *states: attend(*states, block_mask=mask), BLOCKS: blocks}


def gpu(options: argparse.Namespace) -> bool:
    """Attention alone on a GPU: prints its table, for which no target is set. Without a GPU, says that it was not run."""
    if not torch.cuda.is_available():
        print("gpu: not run, for there is none here\n")
        return True
    *states, grad = (part.detach().cuda().bfloat16().transpose(0, 1)[None] for part in rows(GPU_LENGTH))
    states = [part.requires_grad_() for part in states]
    cores = window_cores(GPU_LENGTH, GPU_WINDOW, "cuda")
    runs = {name: lambda own=own: torch.autograd.grad(own(*states), states, grad) for name, own in cores.items()}
    firsts = {name: Timer("run()", globals={"run": run}).timeit(1).mean for name, run in runs.items()}
    for own, other in zip(runs[FLEX](), runs[BLOCKS]()):
        torch.testing.assert_close(own, other, atol=2e-2, rtol=2e-2)
    timers = {name: Timer("run()", globals={"run": run}) for name, run in runs.items()}  # waits for the GPU
    timings = Timings({name: [] for name in runs})
    for number in range(options.rounds):
        for name in sorted(runs, key=list(runs).index, reverse=bool(number % 2)):
            timings[name].append(timers[name].timeit(1).mean)
    lines = []
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        lines.append(
            {
                "core": name,
                "ms": f"{1000 * timings.seconds(name):.2f}",
                f"speed ({FLASH} = 1)": f"{timings.speed(name):.1f}",
                "spread": f"{timings.spread(name):.2f}",
                "peak MiB": f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}",
                "first run, seconds (with compiling)": f"{firsts[name]:.1f}",
            }
        )
    print(table(lines) + "\n")
    return True


SECTIONS = {"core": core, "gpu": gpu}


def main() -> int:
    """Runs the sections that the command line names; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contestant")
    options = parser.parse_args()
    print(header())
    are_met = [SECTIONS[name](options) for name in options.sections]
    return 0 if all(are_met) else 1


if __name__ == "__main__":
    sys.exit(main())
