"""Mixtures of experts: their core beside a dense feed-forward, training steps beside transformers' classes, and decoding.

    python benchmarks/experts.py [--sections core step decode] [--rounds 9] [--device cpu]

One thread, float32; the contestants take turns. A core is forward and backward of 1,024 tokens, and costs so many times a
dense feed-forward of as many active products. A step is forward with the router's losses, backward and AdamW, with as many
parameters on both sides. Exits with 1 if a target is missed. `--device cuda` measures the core alone, in bfloat16.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

from _timing import allocated_peak, compare, header, table  # isort: skip (sets the number of threads before torch loads)

import torch
import transformers
from torch.utils.benchmark import Timer

import variform
from variform.model.feed_forward import FeedForward
from variform.model.moe import Experts

TOKENS, WIDTH = 1024, 384
# Experts, how many a token uses, their inner width
SIZES = [(8, 2, 512), (64, 8, 128), (128, 8, 128)]
CORE_TARGETS = {8: 1.05, 64: 1.2, 128: 1.4}  # at most so many times the dense one
STEP_TARGETS = {"MixtralForCausalLM, 8": 1.0, "MixtralForCausalLM, 64": 1.2, "SwitchTransformers, 64": 3.0}
DECODE_TARGET = 1.3  # at most so many times a dense model of the active size
VOCAB, LAYERS, HEADS, LENGTH, PROMPT, DECODED = 4096, 2, 6, 512, 64, 64
MODEL = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


def core_runs(experts: int, per_token: int, inner: int, device: str) -> dict[str, Callable[[], None]]:
    """Forward and backward of each contestant on the same tokens and choices, as functions without arguments.

    Raises:
        ValueError: if ours and grouped_mm differ.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    fields = {"hidden_size": WIDTH, "hidden_act": "silu", "gated_mlp": True, "mlp_bias": False}
    fields |= {"activation_dropout": 0.0, "num_experts": experts, "moe_intermediate_size": inner}
    fields |= {"glu_limit": None, "glu_offset": 0.0}
    networks: dict[str, torch.nn.Module] = {
        "dense": FeedForward(SimpleNamespace(**fields, intermediate_size=per_token * inner))
    }
    networks["variform"] = Experts(SimpleNamespace(**fields, _experts_implementation="grouped_mm"))
    for parameter in networks["variform"].parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    native = transformers.models.mixtral.modeling_mixtral.MixtralExperts
    sizes = {"hidden_size": WIDTH, "intermediate_size": inner, "num_local_experts": experts, "num_experts_per_tok": 2}
    for implementation in ("grouped_mm", "eager"):
        config = transformers.MixtralConfig(**sizes, experts_implementation=implementation)
        networks[f"transformers, {implementation}"] = native(config)
        networks[f"transformers, {implementation}"].load_state_dict(networks["variform"].state_dict())
    weights, chosen = torch.randn(TOKENS, experts, device=device).softmax(-1).topk(per_token)
    hidden = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype).requires_grad_()
    weights = weights.to(dtype).requires_grad_()
    upstream = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype)

    def make_run(network: torch.nn.Module) -> Callable[[], None]:
        inputs = (hidden,) if isinstance(network, FeedForward) else (hidden, chosen, weights)

        def run() -> None:
            network(*inputs).backward(upstream)
            network.zero_grad()  # afterwards, so that the peak counts the gradients of this run and of no other
            hidden.grad = weights.grad = None

        return run

    networks = {name: network.to(device, dtype) for name, network in networks.items()}
    with torch.no_grad():
        ours, theirs = (networks[name](hidden, chosen, weights) for name in ("variform", "transformers, grouped_mm"))
    if not torch.allclose(ours, theirs, atol=1e-4 if device == "cpu" else 0.1):
        raise ValueError(f"Variform and grouped_mm differ by {(ours - theirs).abs().max():.2e}: nothing is timed.")
    return {name: make_run(network) for name, network in networks.items()}


def core(rounds: int) -> tuple[list[dict[str, str]], bool]:
    """One row a size: cost of each contestant over that of the dense feed-forward."""
    rows, is_met = [], True
    for experts, per_token, inner in SIZES:
        runs = core_runs(experts, per_token, inner, "cpu")
        eager = runs.pop("transformers, eager")
        timings = compare(runs, rounds)
        slow = compare({"dense": runs["dense"], "eager": eager}, 1, warmup=0)  # a hundred times as long
        memory = {name: allocated_peak(run) for name, run in runs.items()}
        cost = 1 / timings.speed("variform")
        met = cost <= CORE_TARGETS[experts] and memory["variform"] <= memory["transformers, grouped_mm"]
        is_met &= met
        rows.append(
            {
                "experts": f"{experts}, {per_token} a token, {inner} wide",
                "variform (dense = 1)": f"{cost:.2f}",
                "target": f"{CORE_TARGETS[experts]}",
                "spread": f"{timings.spread('variform'):.2f}",
                "grouped_mm": f"{1 / timings.speed('transformers, grouped_mm'):.2f}",
                "eager loop": f"{1 / slow.speed('eager'):.1f}",
                "ms": " / ".join(f"{1000 * timings.seconds(name):.0f}" for name in runs),
                "peak MiB": f"{memory['variform']:.0f} / {memory['transformers, grouped_mm']:.0f}",
                "met": "yes" if met else "no",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, is_met


def core_on_gpu(rounds: int) -> list[dict[str, str]]:
    """As `core`, in wall-clock time of kernels that have ended. On a GPU both sides go through grouped_mm."""
    rows = []
    for experts, per_token, inner in SIZES:
        runs = core_runs(experts, per_token, inner, "cuda")
        runs.pop("transformers, eager")
        timers = {name: Timer("run()", globals={"run": run}) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name in sorted(timers, reverse=bool(number % 2)):
                seconds[name].append(timers[name].timeit(10).mean)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
        row = {"experts": f"{experts}, {per_token} a token, {inner} wide"}
        rows.append(row | {f"{name}, ms": f"{1000 * median:.2f}" for name, median in medians.items()})
    return rows


def mixtral(library: str, experts: int, per_token: int, inner: int) -> torch.nn.Module:
    """A decoder whose every layer has experts; `library` may name the implementation behind a comma."""
    if library.startswith("transformers"):
        sizes = {**MODEL, "intermediate_size": inner, "num_local_experts": experts, "num_experts_per_tok": per_token}
        losses = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
        config = transformers.MixtralConfig(**sizes, **losses, num_key_value_heads=HEADS)
        implementation = library.partition(", ")[2] or "grouped_mm"
        return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    fields = {"num_experts": experts, "num_experts_per_tok": per_token, "router_aux_loss_coef": 0.02}
    return variform.from_config(
        variform.VariformDecoderConfig(**MODEL, **fields, moe_intermediate_size=inner, tie_word_embeddings=False)
    )


def switch(library: str, experts: int, inner: int) -> torch.nn.Module:
    """An encoder-decoder whose second layers send each token to one expert; dropout and jitter off."""
    if library.startswith("transformers"):
        sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": inner, "num_heads": HEADS}
        sizes |= {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_experts": experts, "expert_capacity": 64}
        sizes |= {"num_sparse_encoder_layers": LAYERS // 2, "num_sparse_decoder_layers": LAYERS // 2}
        ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
        config = transformers.SwitchTransformersConfig(**sizes, **ids, dropout_rate=0.0, router_jitter_noise=0.0)
        return transformers.SwitchTransformersForConditionalGeneration(config)
    form = variform.load_config("switch-base-8").to_dict()
    stack = {**MODEL, "head_dim": WIDTH // HEADS, "embedding_size": None, "intermediate_size": inner}
    stack |= {"num_key_value_heads": None, "moe_intermediate_size": None, "num_experts": experts}
    stack |= {"mlp_layer_types": ["dense", "sparse"], "expert_capacity": 64, "router_jitter_noise": 0.0}
    stack |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "logit_scale": WIDTH**-0.5}
    for side in ("encoder", "decoder"):
        form[side].update(stack | {"pad_token_id": 0, "eos_token_id": 2})
    form.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return variform.from_config(form)


def training_step(model: torch.nn.Module) -> Callable[[], None]:
    """One step on random tokens, as a function without arguments."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(3, VOCAB, (TOKENS // LENGTH, LENGTH))
    # transformers' classes leave the router's losses out unless they are asked for the logits
    extra = {"output_router_logits": True} if type(model).__module__.startswith("transformers.") else {}

    def step() -> None:
        model(input_ids=ids, labels=ids, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(rounds: int) -> tuple[list[dict[str, str]], bool]:
    """One row a peer, whose fastest implementation counts."""
    rows, is_met = [], True
    for (peer, target), build, sizes, sides in zip(
        STEP_TARGETS.items(),
        (mixtral, mixtral, switch),
        (SIZES[0], SIZES[1], (64, 128)),
        (["grouped_mm", "eager"], ["grouped_mm", "eager"], ["eager"]),
    ):
        names = ["variform", *(f"transformers, {side}" for side in sides)]
        models = {}
        for name in names:
            torch.manual_seed(0)
            models[name] = build(name, *sizes)
        numbers = {sum(p.numel() for p in model.parameters()) for model in models.values()}
        if len(numbers) > 1:
            raise ValueError(f"{peer}: the models have different numbers of parameters, {sorted(numbers)}.")
        runs = {name: training_step(model) for name, model in models.items()}
        timings = compare(runs, rounds)
        best = min(names[1:], key=timings.seconds)
        memory = {name: allocated_peak(runs[name]) for name in ("variform", best)}
        speed = 1 / timings.speed(best)
        met = speed >= target and memory["variform"] <= memory[best]
        is_met &= met
        rows.append(
            {
                "peer": f"{peer} experts, {best.partition(', ')[2]}",
                "M parameters": f"{numbers.pop() / 1e6:.1f}",
                "speed (peer = 1)": f"{speed:.2f}",
                "target": f"{target:.1f}",
                "spread": f"{timings.spread(best):.2f}",
                "ms": f"{1000 * timings.seconds('variform'):.0f} / {1000 * timings.seconds(best):.0f}",
                "peak MiB": f"{memory['variform']:.0f} / {memory[best]:.0f}",
                "met": "yes" if met else "no",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, is_met


@torch.no_grad()
def decode(rounds: int) -> tuple[list[dict[str, str]], bool]:
    """One row a size: process time of a decoded token over that of a dense model of the active size."""
    rows, is_met = [], True
    for experts, per_token, inner in SIZES:
        dense = variform.VariformDecoderConfig(**MODEL, intermediate_size=per_token * inner, tie_word_embeddings=False)
        models = {
            "dense": variform.from_config(dense),
            "variform": mixtral("variform", experts, per_token, inner),
            "transformers": mixtral("transformers", experts, per_token, inner),
        }
        ids = torch.randint(3, VOCAB, (1, PROMPT))
        outputs = {name: model.eval()(ids, use_cache=True) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(DECODED * rounds):
            for name in sorted(models, reverse=bool(number % 2)):
                start = time.process_time()
                token = outputs[name].logits[:, -1:].argmax(-1)
                outputs[name] = models[name](token, past_key_values=outputs[name].past_key_values, use_cache=True)
                seconds[name].append(time.process_time() - start)
        cost = {
            name: statistics.median(own / base for own, base in zip(seconds[name], seconds["dense"]))
            for name in models
        }
        met = cost["variform"] <= DECODE_TARGET
        is_met &= met
        rows.append(
            {
                "experts": f"{experts}, {per_token} a token, {inner} wide",
                "variform (dense = 1)": f"{cost['variform']:.2f}",
                "target": f"{DECODE_TARGET}",
                "MixtralForCausalLM": f"{cost['transformers']:.2f}",
                "ms a token": " / ".join(f"{1000 * statistics.median(times):.2f}" for times in seconds.values()),
                "met": "yes" if met else "no",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, is_met


SECTIONS = {"core": core, "step": steps, "decode": decode}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the core alone, in bfloat16")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("No GPU here.", file=sys.stderr)
            return 2
        rows = core_on_gpu(options.rounds)
        print(f"{header()}\n{table(rows)}")
        return 0
    torch.set_num_threads(1)
    print(header())
    all_met = True
    for section in options.sections:
        rows, is_met = SECTIONS[section](options.rounds)
        print(f"\n{section}\n{table(rows)}")
        all_met &= is_met
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
