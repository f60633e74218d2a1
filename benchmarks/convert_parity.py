"""Converted models beside the native ones that they come from: forward, training step, generation, memory.

    python benchmarks/convert_parity.py [--families bert gpt2 llama t5] [--dtypes float32 bfloat16] [--rounds 9]

Both run the same backend (sdpa) on one thread, with the same weights; the outputs are compared before anything is timed.
Exits with 1 if the converted model is slower than 0.95 of the native one or takes more memory. (GPT-2 makes queries, keys
and values in one call, and we in three, so that its calls a token are shown and not bounded.)
"""

import sys

from _native import HEADS, INNER, LAYERS, VOCAB, WIDTH, main  # isort: skip (sets the number of threads before torch loads)

import torch
import transformers

import variform

SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOLERANCE = 1e-5  # of the largest logit, float32


def build(native: torch.nn.Module, library: str) -> torch.nn.Module:
    """The native model, or the converted one once it is seen to compute the same."""
    native.eval()
    if library == "transformers":
        return native
    converted = variform.from_hf(native)
    ids = torch.randint(3, VOCAB, (1, 32))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if native.config.is_encoder_decoder else {})}
    with torch.no_grad():
        expected, logits = native(**inputs).logits, converted(**inputs).logits
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if difference > TOLERANCE:
        raise RuntimeError(f"The converted {type(native).__name__} is off by {difference:.1e}: nothing to time.")
    return converted


def bert(library: str) -> torch.nn.Module:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **dropouts, num_hidden_layers=LAYERS)
    return build(transformers.BertForMaskedLM(config), library)


def gpt2(library: str) -> torch.nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_inner": INNER, "n_head": HEADS, "n_layer": LAYERS}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts, **IDS)), library)


def llama(library: str) -> torch.nn.Module:
    config = transformers.LlamaConfig(**SIZES, **IDS, num_hidden_layers=LAYERS, num_key_value_heads=2)
    return build(transformers.LlamaForCausalLM(config), library)


def t5(library: str) -> torch.nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_heads": HEADS}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    config = transformers.T5Config(**sizes, **ids, num_layers=LAYERS, dropout_rate=0.0)
    return build(transformers.T5ForConditionalGeneration(config), library)


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5}

if __name__ == "__main__":
    sys.exit(main(__doc__, FAMILIES, is_bound_by_calls=False))
