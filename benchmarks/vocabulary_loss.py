"""Head and loss, forward and backward: `linear_cross_entropy` beside transformers' `ForCausalLMLoss`.

    python benchmarks/vocabulary_loss.py [--rounds 9]

Width 384, float32, one thread. Exits with 1 if a target is missed.
"""

import argparse
import sys

from _timing import compare, header, peak_memory, table  # isort: skip (sets the number of threads before torch loads)

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from variform.model.losses import linear_cross_entropy, shift_labels

# vocabulary, tokens -> at most this part of the extra memory, at least this many times the speed
TARGETS = {(32_768, 1_024): (1 / 5, 1.2), (131_072, 512): (1 / 3, 1.0)}
WIDTH = 384
LOSSES = {
    "transformers": lambda hidden, head, labels: ForCausalLMLoss(head(hidden), labels, head.out_features),
    "variform": lambda hidden, head, labels: linear_cross_entropy(hidden, head, shift_labels(labels)),
}


def build(name: str, vocab_size: int, num_tokens: int):
    """A step: forward and backward, with the gradients of the step before thrown away."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, vocab_size, bias=False)
    hidden = torch.randn(1, num_tokens, WIDTH, requires_grad=True)
    labels = torch.randint(vocab_size, (1, num_tokens))

    def step() -> list[torch.Tensor]:
        head.weight.grad = hidden.grad = None
        loss = LOSSES[name](hidden, head, labels)
        loss.backward()
        return [loss.detach(), hidden.grad, head.weight.grad]

    return step


def build_warm(name: str, vocab_size: int, num_tokens: int):
    """The same after a tiny step, so that what libraries allocate once for themselves is not counted."""
    build(name, 64, 16)()
    return build(name, vocab_size, num_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    rounds = parser.parse_args().rounds
    rows, is_met = [], True
    for sizes, (memory_target, speed_target) in TARGETS.items():
        steps = {name: build(name, *sizes) for name in LOSSES}
        for ours, theirs in zip(steps["variform"](), steps["transformers"]()):
            torch.testing.assert_close(ours, theirs, msg="not timed: the two losses or their gradients differ")
        timings = compare(steps, rounds)
        del steps
        memory = {name: peak_memory(build_warm, name, *sizes) for name in LOSSES}
        for name in LOSSES:
            rows.append(
                {
                    "vocabulary x tokens": f"{sizes[0]:,} x {sizes[1]:,}",
                    "loss": name,
                    "seconds": f"{timings.seconds(name):.3f}",
                    "speed": f"{timings.speed(name):.2f}",
                    "spread": f"{timings.spread(name):.2f}",
                    "at least": "" if name == "transformers" else f"{speed_target:.2f}",
                    "extra MiB": f"{memory[name]:.0f}",
                    "memory": f"{memory[name] / memory['transformers']:.3f}",
                    "at most": "" if name == "transformers" else f"{memory_target:.3f}",
                }
            )
        is_met &= memory["variform"] <= memory_target * memory["transformers"]
        is_met &= timings.speed("variform") >= speed_target
    print(header(), table(rows), "targets met" if is_met else "TARGET MISSED", sep="\n\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
