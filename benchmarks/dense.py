"""Dense forms beside transformers' own classes of equal size: forward, training step, generation, memory.

    python benchmarks/dense.py [--families llama bert t5] [--dtypes float32 bfloat16] [--rounds 9]

Both run the same backend (sdpa) on one thread. Exits with 1 if Variform is slower than 0.95 of its peer, takes more
memory, or makes more dispatcher calls a decoded token.
"""

import argparse
import sys

from _timing import compare, header, peak_memory, table  # isort: skip (sets the number of threads before torch loads)

import torch
import transformers

import variform

SPEED_TARGET = 0.95
# Allocators hand out whole pages and arenas: the same step twice differs by as much
MEMORY_SLACK = 1.03
VOCAB, WIDTH, INNER, LAYERS, HEADS = 8192, 384, 1024, 4, 6
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 256, 32, 32
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(library: str) -> torch.nn.Module:
    """A decoder with rope, RMSNorm and a gated feed-forward."""
    sizes = {**SIZES, **IDS, "num_hidden_layers": LAYERS, "num_key_value_heads": 2}
    if library == "transformers":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rms_norm_eps=1e-6))
    return variform.from_config(variform.VariformDecoderConfig(**sizes, tie_word_embeddings=False))


def bert(library: str) -> torch.nn.Module:
    """A post-norm encoder with learned positions and a masked-LM head; dropout off."""
    sizes = {**SIZES, "pad_token_id": 0, "num_hidden_layers": LAYERS, "hidden_act": "gelu"}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if library == "transformers":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropouts))
    form = variform.load_config("bert-base").to_dict()
    derived = {"head_dim": None, "embedding_size": None, "num_key_value_heads": None}
    form.update(**sizes, **derived, hidden_dropout=0.0, attention_dropout=0.0)
    return variform.from_config(form)


def t5(library: str) -> torch.nn.Module:
    """An encoder-decoder with relative biases; dropout off."""
    if library == "transformers":
        sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_heads": HEADS}
        ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
        native = transformers.T5Config(**sizes, **ids, num_layers=LAYERS, dropout_rate=0.0)
        return transformers.T5ForConditionalGeneration(native)
    form = variform.load_config("t5-small").to_dict()
    stack = {**SIZES, "num_hidden_layers": LAYERS, "head_dim": WIDTH // HEADS, "embedding_size": None}
    stack.update(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, num_key_value_heads=None)
    stack.update(logit_scale=WIDTH**-0.5, pad_token_id=0, eos_token_id=2)
    for side in ("encoder", "decoder"):
        form[side].update(stack)
    form.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return variform.from_config(form)


FAMILIES = {"llama": llama, "bert": bert, "t5": t5}
TASKS = ("forward", "training step", "generation")


def build(family: str, library: str, task: str, dtype: str):
    """One run of a task on a fresh model, as a function without arguments."""
    torch.manual_seed(0)
    model = FAMILIES[family](library)
    model = model.to(getattr(torch, dtype)).train(task == "training step")
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "labels": ids}
    if task == "forward":
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}

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


def calls_a_token(run) -> float:
    """Dispatcher calls of one more decoded token: what the profiler counts, over the tokens decoded."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")) / NEW_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contestant")
    options = parser.parse_args()
    rows, is_met = [], True
    for family in options.families:
        for dtype in options.dtypes:
            for task in TASKS:
                if task == "generation" and family == "bert":
                    continue
                runs = {name: build(family, name, task, dtype) for name in ("transformers", "variform")}
                timings = compare(runs, options.rounds)
                speed = timings.speed("variform")
                calls = {name: calls_a_token(run) if task == "generation" else 0.0 for name, run in runs.items()}
                del runs
                memory = {name: peak_memory(build, family, name, task, dtype) for name in timings}
                is_row_met = (
                    speed >= SPEED_TARGET
                    and memory["variform"] <= MEMORY_SLACK * memory["transformers"] + 1
                    and calls["variform"] <= calls["transformers"]
                )
                is_met &= is_row_met
                rows.append(
                    {
                        "form": family,
                        "dtype": dtype,
                        "task": task,
                        "speed (transformers = 1)": f"{speed:.2f}",
                        "spread": f"{timings.spread('variform'):.2f}",
                        "ms": f"{1000 * timings.seconds('variform'):.0f} / {1000 * timings.seconds('transformers'):.0f}",
                        "peak MiB": f"{memory['variform']:.0f} / {memory['transformers']:.0f}",
                        "calls a token": f"{calls['variform']:.0f} / {calls['transformers']:.0f}"
                        if calls["variform"]
                        else "",
                        "met": "yes" if is_row_met else "NO",
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    print(header())
    print(table(rows))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
