"""`variform show attention` and `variform show experts`, as they are typed."""

import re
import shlex

import pytest
from tiny import build, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from variform.cli import main

WORDS = ["<unk>", "<s>", "</s>", "time", "flies", "like", "an", "arrow", "costs$5", "$6"]


def save(folder, model, has_tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if has_tokenizer:
        tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return save(tmp_path_factory.mktemp("moe"), build(tiny("decoder", num_experts=4), AutoModelForCausalLM))


def test_attention_of_a_decoder(moe, tmp_path, capsys):
    path = tmp_path / "heads.png"
    assert (
        main(["show", "attention", moe, "time flies costs$5 $6", "--layer", "0", "--head", "2", "--out", str(path)])
        == 0
    )
    said = capsys.readouterr().out
    assert "decoder layer 0, head 2" in said and "costs$5 │" in said and "Attention is not explanation" in said
    assert path.read_bytes().startswith(b"\x89PNG")


def test_experts_of_a_decoder(moe, tmp_path, capsys):
    assert main(["show", "experts", moe, "time flies", "--out", str(tmp_path / "experts.png")]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.strip().startswith(("time", "flies"))]
    assert [row[0] for row in rows] == ["time", "flies"] and all(len(row) == 1 + 2 * 2 * 2 for row in rows)


def test_a_pair_writes_its_own_target_where_none_is_given(tmp_path, capsys):
    pair = save(tmp_path / "pair", build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM))
    assert main(["show", "attention", pair, "time flies"]) == 0
    assert "cross-attention layer 1, mean of 3 heads" in capsys.readouterr().out
    assert main(["show", "attention", pair, "time flies", "an arrow"]) == 0
    assert "<s> │" in capsys.readouterr().out


def test_a_native_model_is_shown_as_it_converts(tmp_path, capsys):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(WORDS), bos_token_id=None, eos_token_id=2)
    llama = save(tmp_path / "llama", LlamaForCausalLM(config))
    assert main(["show", "attention", llama, "time flies"]) == 0
    assert "decoder layer 1, mean of 4 heads" in capsys.readouterr().out


def test_the_examples_of_help_work(moe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "my-translator", build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM))
    for name in ("my-model", "my-moe"):
        save(tmp_path / name, build(tiny("decoder", num_experts=4, num_hidden_layers=3), AutoModelForCausalLM))
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    lines = re.findall(r"^  variform (show (?:attention|experts) .*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(lines) == 3 and [main(shlex.split(line)) for line in lines] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["attention", "MOE"], "`show attention` takes a model and a text"),
        (["attention", "MOE", "time", "flies"], "2 texts were given: one is shown; put each in quotes"),
        (["attention", "MOE", ""], "'' has 0 tokens: a picture takes 1 to 256"),
        (["attention", "MOE", "time " * 300], "has 300 tokens"),
        (["attention", "MOE", "time", "--layer", "9"], "(--layer): the decoder has layers 0 to 1"),
        (["attention", "MOE", "time", "--causal"], "`--is_causal` are of patterns"),
        (["attention", "MOE", "time", "--out", "drawn.jpg"], "must end in '.png'"),
        (["experts", "MOE", "time", "--head", "1"], "`--head` are of `show attention`"),
        (["experts", "./nowhere", "time"], "There is no folder ./nowhere"),
        (["full", "--layer", "1"], "`--layer` are of `show attention`"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, moe, capsys):
    assert main(["show", *(moe if word == "MOE" else word for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_a_model_without_a_tokenizer_or_without_experts_is_refused(tmp_path, capsys):
    folder = save(tmp_path / "bare", build(tiny("decoder"), AutoModelForCausalLM), has_tokenizer=False)
    assert main(["show", "attention", folder, "time"]) == 2
    assert "has no tokenizer that loads" in capsys.readouterr().err
    folder = save(tmp_path / "dense", build(tiny("decoder"), AutoModelForCausalLM))
    assert main(["show", "experts", folder, "time"]) == 2
    assert "has no experts" in capsys.readouterr().err
