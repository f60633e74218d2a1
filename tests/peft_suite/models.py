"""The models that the tests load: `python models.py forms|reference FOLDER` saves them, by the ids that the tests name.

With "reference", each id is a tiny model of the library's class that the Hub has under that id; with "forms", a form of ours.
"""

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, set_seed

import variform

VOCABULARY = 512
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZE, "intermediate_size": 64}
PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
DEBERTA = {**WIDE, "pos_att_type": ["c2p", "p2c"], "relative_attention": True, "position_biased_input": False}
GROUPED = {**WIDE, "num_key_value_heads": 2}

# id -> the Auto class that the tests load it with, the type of the library's model and its sizes
NATIVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "AutoModelForCausalLM",
        "opt",
        {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("AutoModelForCausalLM", "gpt2", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("AutoModelForCausalLM", "gpt2", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("AutoModelForCausalLM", "gptj", {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", WIDE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("AutoModelForCausalLM", "mistral", GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("AutoModelForCausalLM", "qwen2", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("AutoModelForCausalLM", "qwen3", {**GROUPED, "head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "AutoModelForCausalLM",
        "gemma3_text",
        {**GROUPED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("AutoModelForSeq2SeqLM", "bart", PAIR),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModel", "bert", WIDE),
    "peft-internal-testing/tiny-random-RobertaModel": ("AutoModel", "roberta", WIDE),
    "peft-internal-testing/tiny-random-DebertaModel": ("AutoModel", "deberta", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("AutoModel", "deberta-v2", DEBERTA),
}

BIASED = {**WIDE, "attention_bias": True, "mlp_bias": True}
EXPERTS = {
    "num_experts": 4,
    "mlp_layer_types": ["dense", "sparse"],
    "num_shared_experts": 1,
    "attention_patterns": ["full", "sliding_window:8"],
}
# form -> the file of tests that it goes through, its Auto class and its config
FORMS: dict[str, tuple[str, str, PreTrainedConfig]] = {
    "dense": (
        "decoder",
        "AutoModelForCausalLM",
        # Heads wide enough for adapters of rank 20 on fewer keys than queries
        variform.VariformDecoderConfig(**BIASED, **IDS, num_key_value_heads=2, head_dim=16),
    ),
    "experts": (
        "decoder",
        "AutoModelForCausalLM",
        variform.VariformDecoderConfig(**BIASED, **IDS, **EXPERTS),
    ),
    "encoder": (
        "feature_extraction",
        "AutoModel",
        variform.VariformEncoderConfig(
            **BIASED, **IDS, position_embedding_type="learned", norm_placement="post", norm_type="layer_norm"
        ),
    ),
    "pair": (
        "encoder_decoder",
        "AutoModelForSeq2SeqLM",
        variform.VariformEncoderDecoderConfig(encoder=BIASED, decoder=BIASED, **IDS, decoder_start_token_id=0),
    ),
}
# What stands for an id that a single test names
STAND_INS = {"AutoModelForCausalLM": "dense", "AutoModelForSeq2SeqLM": "pair", "AutoModel": "encoder"}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, after the three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def save(auto_class: str, config: PreTrainedConfig, folder: Path) -> None:
    """Random weights, the same ones each time, and the tokenizer."""
    set_seed(0)
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_all(kind: str, folder: Path) -> None:
    """Writes one folder an id; replaces what is there, since forms and library may have changed."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (auto_class, model_type, sizes) in NATIVES.items():
        start = {"decoder_start_token_id": 0} if auto_class == "AutoModelForSeq2SeqLM" else {}
        config = transformers.AutoConfig.for_model(model_type, **sizes, **IDS, **start)
        if kind == "forms":
            is_tied = config.tie_word_embeddings  # a test may load as tied what it knows to be stored untied
            config = copy.deepcopy(FORMS[STAND_INS[auto_class]][2])
            config.tie_word_embeddings = is_tied
        save(auto_class, config, folder / name)
    if kind == "forms":
        for form, (_, auto_class, config) in FORMS.items():
            save(auto_class, config, folder / "variform" / form)


if __name__ == "__main__":
    save_all(sys.argv[1], Path(sys.argv[2]))
