"""Dense forms beside transformers' own classes of equal size: forward, training step, generation, memory.

    python benchmarks/dense.py [--families llama bert t5] [--dtypes float32 bfloat16] [--rounds 9]

Both run the same backend (sdpa) on one thread. Exits with 1 if Variform is slower than 0.95 of its peer, takes more
memory, or makes more dispatcher calls a decoded token.
"""

import sys

from _native import HEADS, INNER, LAYERS, VOCAB, WIDTH, main  # isort: skip (sets the number of threads before torch loads)

import torch
import transformers

import variform

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


if __name__ == "__main__":
    sys.exit(main(__doc__, FAMILIES))
