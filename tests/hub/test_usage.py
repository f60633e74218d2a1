"""The snippet of a card runs as it stands, for each class, in a process that has never heard of Variform."""

import ast
import json
import os
import subprocess
import sys

import pytest
import transformers
from tiny import build, tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from variform.hub.cards import CardFacts, form_facts, write_card
from variform.hub.usage import TASKS, checks_of, read_usage, task_of, usage_of
from variform.model.configuration_variform import AUTO_MAP
from variform.training.lora import LoraArguments, save_adapter
from variform.training.models import build_model
from variform.training.options import ModelArguments
from variform.training.tokenizer import train_tokenizer

SHAPES = {"variform_encoder": "encoder", "variform_decoder": "decoder", "variform_encoder_decoder": "encoder_decoder"}
CASES = {
    f"{SHAPES[model_type]}-{name}{suffix}": (SHAPES[model_type], name, suffix == "")
    for model_type, entries in AUTO_MAP.items()
    for name in entries
    for suffix in ("", "-without-tokenizer")
    if name != "AutoConfig" and (suffix == "" or name in ("AutoModel", "AutoModelForMultipleChoice"))
}
TEXT = "[PAD] [BOS] [EOS] [MASK] [UNK] a text to read words tag the sky is blue . , who wrote it ? mary letter"
WORDS = TEXT.split()

# Each folder's card is read, and its code run in that folder; {name: what it printed}
STRANGER = """
import contextlib, io, json, os, re, sys
sys.modules["variform"] = None
printed = {}
for name, folder in json.load(sys.stdin).items():
    os.chdir(folder)
    code = re.search(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, name, "exec"), {})
    printed[name] = output.getvalue().strip()
print(json.dumps(printed))
"""


def word_tokenizer():
    """Reads a few words, lower-cased, between a beginning and an end."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS] $B", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_input_names=names, **special)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the snippet of each class prints."""
    folders = {}
    for name, (shape, auto_class, has_tokenizer) in CASES.items():
        folder = folders[name] = tmp_path_factory.mktemp("usage") / name
        if shape == "encoder_decoder":
            config = tiny(shape, encoder={"vocab_size": len(WORDS)}, decoder={"vocab_size": len(WORDS)})
        else:
            config = tiny(shape, vocab_size=len(WORDS))
        model = build(config, getattr(transformers, auto_class))
        model.save_pretrained(folder)
        if has_tokenizer:
            word_tokenizer().save_pretrained(folder)
        write_card(folder, CardFacts(name=name, summary="Tiny.", auto_class=auto_class, **form_facts(config)))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input=json.dumps({name: str(folder) for name, folder in folders.items()}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_snippet_of_a_card_prints_an_answer(name, printed):
    _, auto_class, has_tokenizer = CASES[name]
    if auto_class == "AutoModel" or not has_tokenizer:
        assert printed[name].startswith("torch.Size([")
    elif auto_class in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        assert "LABEL_" in printed[name]
    elif auto_class == "AutoModelForMultipleChoice":
        assert printed[name] in ("blue.", "a kind of soup.")
    elif auto_class == "AutoModelForMaskedLM":
        assert printed[name].count("'") == 6  # three words
    # Other answers are free text, which may be empty


def test_every_class_has_a_snippet_and_checks_of_its_own():
    assert set(TASKS) == {name for entries in AUTO_MAP.values() for name in entries} - {"AutoConfig"}
    assert all(task_of(name) and checks_of(name) for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("remote_code", [False, True])
def test_the_snippet_loads_from_the_repo_and_trusts_where_it_must(name, remote_code):
    code = usage_of(name, "me/x", remote_code=remote_code)
    compile(code, name, "exec")
    assert 'path = "me/x"\n' in code and ("trust_remote_code" in code) == remote_code


def test_an_example_is_quoted_whatever_it_holds():
    text = 'He said: "no {braces}",\n\\ and µ'
    code = usage_of("AutoModelForCausalLM", ".", text)
    said = {}
    exec(code[code.index("inputs = ") :].splitlines()[0], {"tokenizer": lambda text, **kwargs: said.update(text=text)})
    assert said == {"text": text}
    assert '("who?", "me")' in usage_of("AutoModelForQuestionAnswering", ".", ["who?", "me"])
    assert '("it", ["a", "b"])' in usage_of("AutoModelForMultipleChoice", ".", ["it", ["a", "b"]])


def test_a_model_that_knows_how_long_its_answers_may_be_is_not_told(tmp_path):
    assert "generate(**inputs, max_new_tokens=20)" in usage_of("AutoModelForSeq2SeqLM", ".")
    transformers.GenerationConfig(max_length=9).save_pretrained(tmp_path)
    assert read_usage(tmp_path)["knows_length"]
    assert "generate(**inputs)" in usage_of("AutoModelForSeq2SeqLM", ".", knows_length=True)


def test_an_adapter_is_put_on_its_base():
    code = usage_of("AutoModelForCausalLM", "me/adapter", base="me/base")
    assert (
        'from_pretrained("me/base", trust_remote_code=True)' in code
        and "PeftModel.from_pretrained(base, path)" in code
    )


def test_an_adapter_of_a_native_model_on_this_machine_is_loaded_without_its_path(tmp_path, monkeypatch, capsys):
    base, folder = tmp_path / "native", tmp_path / "run"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(base)
    tokenizer = train_tokenizer(["a story that ends"] * 4, 280)
    tokenizer.save_pretrained(folder)
    options = LoraArguments(use_peft=True, lora_r=2)
    model = build_model(ModelArguments(model=str(base)), AutoModelForMaskedLM, tokenizer, lora=options)
    save_adapter(model, folder, base_name=str(base))
    code = usage_of("AutoModelForMaskedLM", ".", **read_usage(folder))
    assert str(tmp_path) not in code
    monkeypatch.chdir(folder)
    exec(code, {})
    assert len(ast.literal_eval(capsys.readouterr().out.splitlines()[-1])) == 3


def test_another_class_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"`auto_class='AutoModelForSinging'` is not one of \['AutoModel',"):
        usage_of("AutoModelForSinging", ".")
