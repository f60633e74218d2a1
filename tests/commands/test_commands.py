"""The command `variform`, as it is typed."""

import re

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import variform
from variform.cli import main
from variform.conversion.check import TEXTS
from variform.model.pattern_base import public_fields
from variform.model.patterns import PATTERNS

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama, with a tokenizer of the words of the texts that are checked."""
    folder = tmp_path_factory.mktemp("native") / "llama"
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *sorted(set(" ".join(TEXTS).split()))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, vocab_size=len(words), bos_token_id=None, eos_token_id=1)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_there_and_back_again(llama, tmp_path, capsys):
    assert main(["convert", str(llama), str(tmp_path / "ours"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "decoder: a token sees itself and the past" in said
    assert "VariformDecoderForCausalLM, 1 file of weights" in said
    assert "tokens of text" in said and "The two compute the same." in said
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--check"]) == 0
    stored, back = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "back"))
    assert stored.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in stored.items())


def test_another_native_family(llama, tmp_path, capsys):
    assert main(["convert", str(llama), str(tmp_path / "mistral"), "--to", "mistral", "--check"]) == 0
    assert "MistralForCausalLM" in capsys.readouterr().out
    assert hf.AutoConfig.from_pretrained(tmp_path / "mistral").model_type == "mistral"


def test_check_finds_a_changed_weight(llama, tmp_path, monkeypatch, capsys):
    from variform.conversion import convert as conversion

    def convert_and_change(source, target, **options):
        converted = convert(source, target, **options)
        tensors = load_file(target + "/model.safetensors")
        tensors["model.norm.weight"] *= 1.001
        save_file(tensors, target + "/model.safetensors", metadata={"format": "pt"})
        return converted

    convert = conversion.convert_folder
    monkeypatch.setattr(conversion, "convert_folder", convert_and_change)
    assert main(["convert", str(llama), str(tmp_path / "ours"), "--check"]) == 1
    assert "They differ by more than 1e-05" in capsys.readouterr().out


def test_a_folder_in_the_way_is_not_touched(llama, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["convert", str(llama), str(tmp_path)]) == 2
    assert "exists already: name another folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "./nowhere", "out"], "There is no folder ./nowhere"),
        (["info", "bert-bsae"], "did you mean 'bert-base'?"),
        (["info", "gpt2", "gpt2", "gpt2"], "`info` shows one form or compares two, got 3"),
        (["show", "sliding_windw:8"], "Did you mean 'sliding_window'?"),
        (["show", "bert-bsae"], "did you mean 'bert-base'?"),
        (["show", "nonsense"], "`attention_patterns='nonsense'` is not one of"),
        (["show", "./nowhere"], "'./nowhere' is neither a file nor one of the forms"),
        (["show", "dilated:3,gpa=2"], "'dilated' needs ['window'] and may have ['gap']"),
        (["show", "sliding_window:1", "--causal"], "use 2 or more"),
        (["show", "full", "--global", "1,x"], "`--global 1,x` must be whole numbers with commas between them"),
        (["show", "full", "--documents", "3;4"], "`--documents 3;4` must be whole numbers"),
        (["show", "full", "--prefix", "3"], "`prefix=3` (--prefix) is read by 'prefix_lm'"),
        (["show", "bert-base", "--heads", "3"], "(--heads) are for patterns"),
        (["show", "full", "--out", "drawn.jpg"], "`path='drawn.jpg'` (--out) must end in '.png'"),
        (["show", "full", "--out", "nowhere/drawn.png"], "there is no folder 'nowhere'; make it"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and "Traceback" not in said


def test_info_on_a_name_a_folder_and_two(llama, capsys):
    assert main(["info", "gpt2"]) == 0
    assert "learned, one vector for each of 1,024" in capsys.readouterr().out
    assert main(["info", str(llama)]) == 0
    assert "rotary" in capsys.readouterr().out
    assert main(["info", "bert-base", "roberta-base"]) == 0
    assert "position_offset" in capsys.readouterr().out


def test_show_draws_patterns_and_writes_a_file(tmp_path, capsys):
    path = tmp_path / "drawn.png"
    assert main(["show", "sliding_window:2", "prefix_lm", "--length", "6", "--prefix", "3", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count("sliding_window:2") == 2 and "causal, prefix 3" in said
    drawn = [re.findall(r"│(.{6})│", line) for line in said.splitlines()]
    both_ways, causal, prefix = zip(*(row for row in drawn if row))
    assert both_ways == ("███▄  ", "▀████▄", "  ▀███")
    assert causal == ("█▄    ", " ▀█▄  ", "   ▀█▄")
    assert prefix == ("███   ", "███▄  ", "█████▄")
    assert f"Wrote {path}." in said and path.read_bytes().startswith(b"\x89PNG")


def test_show_takes_every_pattern(capsys):
    specs = [name + ":4" * bool(public_fields(pattern)) for name, pattern in PATTERNS.items()]
    assert main(["show", *specs, "--length", "8"]) == 0
    said = capsys.readouterr().out
    assert [spec for spec in specs if spec not in said] == []


def test_show_packs_documents_and_marks_places(capsys):
    assert main(["show", "local_global:1", "--both-ways", "--documents", "2,4", "--global", "2"]) == 0
    said = capsys.readouterr().out
    assert "both ways, place 2 marked, 2 documents" in " ".join(said.split())
    assert re.findall(r"│(.{6})│", said) == ["██    ", "  ███▀", "  █▀██"]


def test_show_draws_a_form_by_name_folder_or_file(llama, tmp_path, capsys):
    variform.load_config("bert-base").save_pretrained(tmp_path)
    for form in ("bert-base", str(tmp_path), str(tmp_path / "config.json")):
        assert main(["show", form, "--length", "5"]) == 0
        assert "both ways, layers 0-11" in capsys.readouterr().out
    assert main(["show", str(llama), "sliding_window:2", "--length", "4"]) == 0
    assert "causal, layers 0-1" in (said := capsys.readouterr().out) and "sliding_window:2" in said


@pytest.mark.parametrize(
    "arguments", [["show", "full", "--length", "x"], ["show"], ["draw", "full"], ["show", "full", "--png"]]
)
def test_a_command_that_is_misspelt_shows_how_it_is_used(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: variform" in capsys.readouterr().err


def test_help_teaches_by_examples_that_work(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    said = capsys.readouterr().out
    assert [name for name in PATTERNS if f"\n  {name}" not in said] == []
    assert "strided:STRIDE[,heads=merged|split|column]\n      the last `stride` keys" in said
    # Those of models that a reader has are run with some in test_show_texts.py
    examples = re.findall(r"^  variform (show (?!attention|experts).*)$", said, flags=re.MULTILINE)
    assert len(examples) >= 3 and [main(example.split()) for example in examples] == [0] * len(examples)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert [command for command in ("convert", "info", "show") if f"  variform {command} " not in said] == []


def test_from_hf_logs_the_form_that_it_found(llama, caplog):
    with caplog.at_level("INFO", logger="variform"):
        variform.from_hf(llama)
    assert "decoder: a token sees itself and the past" in caplog.text
    assert "2, 24 wide" in caplog.text
