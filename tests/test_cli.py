"""The command `variform`, as it is typed."""

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
    from variform import cli

    def convert_and_change(source, target, **options):
        converted = convert(source, target, **options)
        tensors = load_file(target + "/model.safetensors")
        tensors["model.norm.weight"] *= 1.001
        save_file(tensors, target + "/model.safetensors", metadata={"format": "pt"})
        return converted

    convert = cli.convert_folder
    monkeypatch.setattr(cli, "convert_folder", convert_and_change)
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


def test_from_hf_logs_the_form_that_it_found(llama, caplog):
    with caplog.at_level("INFO", logger="variform"):
        variform.from_hf(llama)
    assert "decoder: a token sees itself and the past" in caplog.text
    assert "2, 24 wide" in caplog.text
