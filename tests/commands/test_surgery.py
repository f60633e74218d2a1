"""`variform surgery`, as it is typed."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.testing import assert_close

import variform
from variform.cli import main
from variform.conversion.check import TEXTS


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The folder of a tiny GPT-2 with a tokenizer of words, which cuts texts at the model's longest input."""
    folder = tmp_path_factory.mktemp("native") / "gpt2"
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *sorted(set(" ".join(TEXTS).split()))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    options = {"unk_token": "<unk>", "eos_token": "</s>", "model_max_length": 64}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64}
    config = hf.GPT2Config(vocab_size=len(words), bos_token_id=1, eos_token_id=1, **sizes)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def run(capsys, *arguments: object) -> str:
    assert main(["surgery", *map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())


@torch.no_grad()
def test_a_native_checkpoint_gets_experts(gpt2, tmp_path, capsys):
    numbers = ["--num_experts", 8, "--num_experts_per_tok", 4, "--granularity", 2, "--layers", "1,3"]
    said = run(capsys, "upcycle", gpt2, tmp_path / "moe", *numbers, "--router_aux_loss_coef", 0.02)
    assert "Equal to the original on every input" in said
    assert "in 2 of 4 layers a token uses 4 of 8 experts" in said and "real tokens of the batch" in said
    assert "random tokens" not in said and "Wrote" in said
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    config = model.config
    assert config.mlp_layer_types == ["dense", "sparse"] * 2
    assert (config.num_experts_per_tok, config.router_aux_loss_coef) == (4, 0.02)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "moe")
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    native = hf.AutoModelForCausalLM.from_pretrained(gpt2)
    assert_close(model(**batch).logits, native(**batch).logits, rtol=0, atol=1e-5)


def test_experts_move_to_a_layout_and_back(gpt2, tmp_path, capsys):
    run(capsys, "upcycle", gpt2, tmp_path / "moe", "--num_experts", 4, "--layers", "every:2")
    said = run(capsys, "layout", tmp_path / "moe", tmp_path / "list", "--experts_layout", "modulelist")
    assert "stored otherwise" in said
    run(capsys, "layout", tmp_path / "list", tmp_path / "back", "--experts_layout", "fused")
    first, back = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "back"))
    assert first.keys() == back.keys() and all(torch.equal(tensor, back[name]) for name, tensor in first.items())


def test_a_longer_model_has_a_tokenizer_that_cuts_later(gpt2, tmp_path, capsys):
    length = ["--max_position_embeddings", 256]
    said = run(
        capsys, "sparsify", gpt2, tmp_path / "long", "--attention_patterns", "sliding_window:8", "full", *length
    )
    assert "Equal to the original where the decoder reads up to 8 tokens." in said
    assert "never trained" in said
    config = hf.AutoConfig.from_pretrained(tmp_path / "long")
    assert [entry["name"] for entry in config.attention_patterns] == ["sliding_window", "full"]
    assert json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())["model_max_length"] == 256


def test_one_side_of_a_pair(tmp_path, capsys):
    torch.manual_seed(0)
    stack = {
        "vocab_size": 30,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "relu",
    }
    config = variform.VariformEncoderDecoderConfig(encoder=stack, decoder=stack, decoder_start_token_id=1)
    variform.from_config(config).save_pretrained(tmp_path / "pair")
    said = run(capsys, "upcycle", tmp_path / "pair", tmp_path / "moe", "--num_experts", 4, "--side", "decoder")
    assert "random tokens" in said
    config = hf.AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.encoder.num_experts, config.decoder.num_experts) == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["upcycle", "SRC", "MINE", "--num_experts", "4"], "exists already: name another folder"),
        (["upcycle", "./nowhere", "DST", "--num_experts", "4"], "There is no folder ./nowhere"),
        (
            ["upcycle", "SRC", "DST", "--num_experts", "3", "--granularity", "2"],
            "is not a multiple of `granularity=2`",
        ),
        (["upcycle", "SRC", "DST", "--num_experts", "4", "--layers", "1,x"], '"all", "every:2", or a list of numbers'),
        (
            ["upcycle", "SRC", "DST", "--num_experts", "4", "--side", "encoder"],
            "`num_experts='encoder'` is not one of",
        ),
        (["sparsify", "SRC", "DST"], "There is nothing to change"),
        (["sparsify", "SRC", "DST", "--attention_patterns", "slidng_window:4"], "Did you mean 'sliding_window'"),
        (["layout", "SRC", "DST", "--experts_layout", "fused"], "is of experts, and the model has none"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(gpt2, tmp_path, capsys, arguments, sentence):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    places = {"SRC": str(gpt2), "DST": str(tmp_path / "out"), "MINE": str(tmp_path / "mine")}
    assert main(["surgery", *(places.get(word, word) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "words", [["surgery"], ["surgery", "upcycle"], ["surgery", "sparsify"], ["surgery", "layout"]]
)
def test_help_explains(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 128
    assert "SRC" in said or "examples:" in said
