"""Checkpoint folders there and back: weights, config, tokenizer and what else belongs to them, with and without our code.

One tiny model of each shape is saved as its users save it, converted, and converted back; another process, in which
`import variform` fails, loads the converted folders.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from variform.conversion import convert
from variform.conversion.convert import convert_folder, from_hf

TEXTS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse,",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "Alice was beginning to get very tired of sitting by her sister on the bank.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
IDS = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 3}


class Case(NamedTuple):
    """A native model to convert, and the head that it has."""

    config: PreTrainedConfig
    auto_name: str


CASES = {
    "encoder": Case(BertConfig(**IDS, **WIDE, max_position_embeddings=64), "AutoModelForMaskedLM"),
    "decoder": Case(
        LlamaConfig(**IDS, **WIDE, head_dim=4, num_key_value_heads=1, max_position_embeddings=64),
        "AutoModelForCausalLM",
    ),
    "encoder_decoder": Case(
        BartConfig(
            **IDS,
            d_model=12,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=3,
            decoder_attention_heads=2,
            encoder_ffn_dim=14,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        "AutoModelForSeq2SeqLM",
    ),
}

# Takes a folder with jobs.json, {name: [folder of a checkpoint, Auto class]}, and inputs.pt; leaves {name: logits}
STRANGER = """
import json, sys
from pathlib import Path
sys.modules["variform"] = None  # `import variform` raises, even where it is installed
import torch, transformers
folder = Path(sys.argv[1])
given, results = torch.load(folder / "inputs.pt"), {}
for name, (path, auto_name) in json.loads((folder / "jobs.json").read_text()).items():
    model = getattr(transformers, auto_name).from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        results[name] = (model(**given[name]).logits, tokenizer(given["texts"])["input_ids"])
torch.save(results, folder / "results.pt")
"""


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that learned from `TEXTS`: of bytes for decoders, of lower-case words for the others."""
    if kind == "decoder":
        learned = Tokenizer(models.BPE(unk_token="<unk>"))
        learned.pre_tokenizer = pre_tokenizers.Metaspace()
        learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL))
    else:
        learned = Tokenizer(models.WordLevel(unk_token="<unk>"))
        learned.normalizer = normalizers.Lowercase()
        learned.pre_tokenizer = pre_tokenizers.Whitespace()
        learned.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
        learned.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        padding_side="left" if kind == "decoder" else "right",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        **names,
    )


def native(config: PreTrainedConfig, auto_name: str) -> PreTrainedModel:
    """A native model in evaluation mode whose every tensor is random."""
    torch.manual_seed(0)
    model = getattr(transformers, auto_name).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def given(kind: str) -> dict[str, torch.Tensor]:
    """The texts as a model takes them, padded."""
    tokenizer = make_tokenizer(kind)
    batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False))
    if kind == "encoder_decoder":
        batch["decoder_input_ids"] = batch["input_ids"][:, :7]
    if kind == "decoder":
        # Native classes count positions from the first slot, padding or not, unless they are told
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


@torch.no_grad()
def logits(model: PreTrainedModel, kind: str) -> torch.Tensor:
    return real(model(**given(kind)).logits, kind)


def real(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """`(tokens, vocab_size)`: those of real tokens, without padding."""
    mask = given(kind)["attention_mask"].bool()
    return logits[mask[:, : logits.shape[1]]]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return state


def assert_same(folder: Path, other: Path) -> None:
    """The same tensors in both folders, bit by bit."""
    first, second = read(folder), read(other)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def plain(config: PreTrainedConfig | GenerationConfig) -> dict:
    """What a config says, without who wrote it where."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """{native, ours, back}/{shape}: every case as saved, converted, and converted back; and what a stranger made of it."""
    folder = tmp_path_factory.mktemp("folders")
    for kind, case in CASES.items():
        source = folder / "native" / kind
        model = native(*case)
        if model.can_generate():
            model.generation_config.update(max_new_tokens=11, num_beams=3, no_repeat_ngram_size=2)
        model.save_pretrained(source)
        make_tokenizer(kind).save_pretrained(source)
        (source / "preprocessor_config.json").write_text('{"size": 3}', encoding="utf-8")
        (source / "LICENSE.txt").write_text("Do as you like.", encoding="utf-8")
        convert_folder(source, folder / "ours" / kind)
        convert_folder(folder / "ours" / kind, folder / "back" / kind)

    jobs = {kind: (str(folder / "ours" / kind), case.auto_name) for kind, case in CASES.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    torch.save({"texts": TEXTS, **{kind: given(kind) for kind in CASES}}, folder / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment.update(HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", CASES)
def test_weights_come_back_bit_by_bit(kind, world):
    assert_same(world / "native" / kind, world / "back" / kind)


@pytest.mark.parametrize("kind", CASES)
def test_config_comes_back(kind, world):
    there, back = (AutoConfig.from_pretrained(world / where / kind) for where in ("native", "back"))
    assert type(back) is type(there)
    assert plain(back) == plain(there)


@pytest.mark.parametrize("where", ["ours", "back"])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_generation_config_comes_along(kind, where, world):
    there, here = (GenerationConfig.from_pretrained(world / place / kind) for place in ("native", where))
    assert here.max_new_tokens == 11
    assert plain(here) == plain(there)


@pytest.mark.parametrize("where", ["ours", "back"])
@pytest.mark.parametrize("kind", CASES)
def test_tokenizer_comes_along(kind, where, world):
    there, here = (AutoTokenizer.from_pretrained(world / place / kind) for place in ("native", where))
    expected = there(TEXTS, padding=True)
    assert here(TEXTS, padding=True)["input_ids"] == expected["input_ids"]
    assert here.batch_decode(expected["input_ids"]) == there.batch_decode(expected["input_ids"])
    assert here.special_tokens_map == there.special_tokens_map
    for name in ("padding_side", "model_max_length", "chat_template"):
        assert getattr(here, name) == getattr(there, name), name


@pytest.mark.parametrize("where", ["ours", "back"])
@pytest.mark.parametrize("kind", CASES)
def test_processor_and_licence_come_along(kind, where, world):
    for name in ("preprocessor_config.json", "LICENSE.txt"):
        assert (world / where / kind / name).read_bytes() == (world / "native" / kind / name).read_bytes()


@pytest.mark.parametrize("kind", CASES)
def test_the_converted_folder_computes_the_same(kind, world):
    auto = getattr(transformers, CASES[kind].auto_name)
    expected = logits(auto.from_pretrained(world / "native" / kind).eval(), kind)
    model = auto.from_pretrained(world / "ours" / kind).eval()
    assert type(model).__module__ == "variform.model.modeling_variform"
    assert_close(logits(model, kind), expected)


@pytest.mark.parametrize("kind", CASES)
def test_a_stranger_computes_the_same(kind, world):
    expected = logits(native(*CASES[kind]), kind)
    found, ids = torch.load(world / "results.pt")[kind]
    assert_close(real(found, kind), expected)
    assert ids == make_tokenizer(kind)(TEXTS)["input_ids"]


@pytest.mark.parametrize("kind", CASES)
def test_what_comes_back_needs_none_of_our_code(kind, world):
    assert not list((world / "back" / kind).glob("*.py"))
    assert "variform" not in (world / "back" / kind / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", CASES)
def test_the_folder_is_as_the_class_itself_saves_it(kind, world, tmp_path):
    """Whoever loads and saves a converted folder has the same files, and another conversion finds the same."""
    auto = getattr(transformers, CASES[kind].auto_name)
    auto.from_pretrained(world / "ours" / kind).save_pretrained(tmp_path / "saved")
    assert_same(tmp_path / "saved", world / "ours" / kind)
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert saved <= {path.name for path in (world / "ours" / kind).iterdir()}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", world / "ours" / kind)]
    assert configs[0] == configs[1]


# From one native family to another


def test_from_one_native_family_to_another(tmp_path):
    config = LlamaConfig(**IDS, **WIDE, head_dim=4, num_key_value_heads=1, max_position_embeddings=64)
    llama = native(config, "AutoModelForCausalLM")
    llama.save_pretrained(tmp_path / "llama")
    make_tokenizer("decoder").save_pretrained(tmp_path / "llama")
    converted = convert_folder(tmp_path / "llama", tmp_path / "mistral", to="mistral")
    assert isinstance(converted.config, MistralConfig) and converted.config.sliding_window is None
    mistral = AutoModelForCausalLM.from_pretrained(tmp_path / "mistral").eval()
    assert type(mistral).__name__ == "MistralForCausalLM"
    expected = logits(llama, "decoder")
    assert_close(logits(mistral, "decoder"), expected)
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(TEXTS)["input_ids"] for name in ("llama", "mistral")]
    assert ids[0] == ids[1]
    assert not [path.name for path in (tmp_path / "mistral").iterdir() if path.is_dir() or path.suffix == ".py"]


def test_a_family_that_cannot_express_the_form_is_refused(tmp_path):
    llama = native(LlamaConfig(**IDS, **WIDE, head_dim=4, attention_bias=True), "AutoModelForCausalLM")
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"mistral cannot express `attention_bias="):
        convert_folder(tmp_path / "llama", tmp_path / "mistral", to="mistral")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# Shards and dtypes


@pytest.mark.parametrize("kind", CASES)
def test_a_checkpoint_in_shards_stays_in_shards(kind, tmp_path):
    native(*CASES[kind]).save_pretrained(tmp_path / "native", max_shard_size="5KB")
    shards = convert_folder(tmp_path / "native", tmp_path / "ours").shards
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == shards > 1
    state = read(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    sizes = Counter()  # bytes of tensors, without the headers
    for name, file in index["weight_map"].items():
        sizes[file] += state[name].nbytes
    assert len(sizes) == shards
    assert max(sizes.values()) <= max(path.stat().st_size for path in (tmp_path / "native").glob("*.safetensors"))
    convert_folder(tmp_path / "ours", tmp_path / "back")
    assert_same(tmp_path / "native", tmp_path / "back")
    expected = logits(native(*CASES[kind]), kind)
    found = logits(getattr(transformers, CASES[kind].auto_name).from_pretrained(tmp_path / "ours").eval(), kind)
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CASES)
def test_a_checkpoint_stays_in_its_dtype(kind, dtype, tmp_path):
    native(*CASES[kind]).to(dtype).save_pretrained(tmp_path / "native")
    convert_folder(tmp_path / "native", tmp_path / "ours")
    convert_folder(tmp_path / "ours", tmp_path / "back")
    assert {tensor.dtype for tensor in read(tmp_path / "ours").values()} == {dtype}
    assert_same(tmp_path / "native", tmp_path / "back")
    for where in ("native", "ours", "back"):
        assert AutoConfig.from_pretrained(tmp_path / where).dtype == dtype
    auto = getattr(transformers, CASES[kind].auto_name)
    assert auto.from_pretrained(tmp_path / "ours").dtype == dtype
    assert from_hf(tmp_path / "native").dtype == dtype


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repo, "someone/llama", in `tmp_path`; notes what is asked of it."""
    asked = []

    def download(repo_id: str, **options) -> str:
        asked.append((repo_id, options))
        return str(tmp_path / "repo")

    monkeypatch.setattr(convert, "snapshot_download", download)
    native(*CASES["decoder"]).save_pretrained(tmp_path / "repo")
    return asked


@pytest.mark.parametrize("how", ["from_hf", "convert_folder"])
def test_a_repo_is_downloaded_without_code_or_pickles(how, hub, tmp_path):
    where = {"revision": "v1", "token": "secret", "cache_dir": tmp_path / "cache", "local_files_only": True}
    if how == "from_hf":
        found = logits(from_hf("someone/llama", **where), "decoder")
        torch.testing.assert_close(found, logits(native(*CASES["decoder"]), "decoder"))
    else:
        convert_folder("someone/llama", tmp_path / "ours", **where)
        convert_folder(tmp_path / "ours", tmp_path / "back")
        assert_same(tmp_path / "back", tmp_path / "repo")
    ((repo_id, options),) = hub
    patterns = options.pop("allow_patterns")
    assert (repo_id, options) == ("someone/llama", where)
    assert "*.safetensors" in patterns and not {"*.bin", "*.py", "*"} & set(patterns)


def test_pickles_are_downloaded_where_there_is_nothing_else(hub, tmp_path):
    (tmp_path / "repo" / "model.safetensors").unlink()
    model = native(*CASES["decoder"])
    torch.save(model.state_dict(), tmp_path / "repo" / "pytorch_model.bin")
    torch.testing.assert_close(logits(from_hf("someone/llama"), "decoder"), logits(model, "decoder"))
    assert ["*.bin" in options["allow_patterns"] for _, options in hub] == [False, True]


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "a/b/c"])
def test_what_cannot_be_a_repo_is_a_folder_that_is_missing(source, hub):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        from_hf(source)
    assert not hub
