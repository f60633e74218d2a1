"""Every recipe in configs/recipes runs for two steps, with its own form, on a few examples in the columns of its data."""

import json
import re
from pathlib import Path

import pytest
import yaml
from script_inputs import ROOT, WORDS, write_lines
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import variform
from variform.forms import FormLoader, config_from_dict
from variform.training.tokenizer import train_tokenizer

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
# Where the head comment does not name the script
SCRIPTS = {
    "descriptions": "causal_lm",
    "descriptions_lora": "causal_lm",
    "distilled_sentiment": "distill",
    "g2p": "seq2seq",
    "long_text": "causal_lm",
    "minilm_reviews": "masked_lm",
    "preferences": "dpo",
    "pronunciation": "seq2seq",
    "pronunciation_experts": "seq2seq",
    "reviews_masked": "masked_lm",
    "sentiment": "classify",
    "sentiment_lora": "classify",
    "answers": "answer",
    "summaries": "seq2seq",
    "tags": "tag",
    "translation": "seq2seq",
    "upcycling": "causal_lm",
}
MOST_KEYS = 25
QUICK = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--per_device_eval_batch_size",
    "4",
    "--logging_steps",
    "1",
]


def sentence(number: int, words: int = 8) -> str:
    return " ".join(WORDS[(number + 3 * place) % len(WORDS)] for place in range(words))


def rows_of(dataset: str, config: str | None) -> list[dict]:
    """A dozen examples with the columns of a registered set."""
    rows = []
    for n in range(12):
        text = sentence(n)
        row = {
            "cmudict": {"text": "abcdefghijkl"[n] * 3, "target": "AE B", "variants": ["AE B", "AE P"]},
            "shakespeare": {"text": sentence(n, 40)},
            "movie_reviews": {"text": text, "label": ("neg", "pos")[n % 2]},
            "brown": {"tokens": text.split(), "tags": ["N" if len(word) > 3 else "D" for word in text.split()]},
            "package_descriptions": {"text": f"{text} {n}", "target": text},
            "cloze_questions": {
                "question": f"which one? {n}",
                "context": f"{text} {n} ends",
                "answers": {"text": [str(n)], "answer_start": [len(text) + 1]},
            },
            "preferences": {"prompt": text, "chosen": f" story {n}", "rejected": f" dull {n}"},
        }[dataset]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Small tokenizers and models in place of those that a recipe starts from."""
    folder = tmp_path_factory.mktemp("stand_ins")
    places = {}
    for frame in ("both", "end", "start"):
        places[frame] = folder / frame
        train_tokenizer([sentence(n) for n in range(40)], 330, frame=frame).save_pretrained(places[frame])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_tokenizer([sentence(n) for n in range(40)], 330)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)).save_pretrained(
        folder / "bert"
    )
    tokenizer.save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(vocab_size=330, **sizes)).save_pretrained(folder / "llama")
    # SmolLM2's puts no special token around a text
    train_tokenizer([sentence(n) for n in range(40)], 330, frame="none").save_pretrained(folder / "llama")
    for shape, frame in (("encoder", "both"), ("decoder", "start")):
        form = {"model_type": f"variform_{shape}", "vocab_size": 330, "pad_token_id": 0, **sizes}
        variform.from_config(form).save_pretrained(folder / shape)
        places[shape] = folder / shape
        train_tokenizer([sentence(n) for n in range(40)], 330, frame=frame).save_pretrained(folder / shape)
    ids = {"pad_token_id": 0, "decoder_start_token_id": 1}
    stack = {"vocab_size": 330, **sizes}
    form = {"model_type": "variform_encoder_decoder", "encoder": stack, "decoder": stack, **ids}
    variform.from_config(form).save_pretrained(folder / "pair")
    AutoTokenizer.from_pretrained(places["end"]).save_pretrained(folder / "pair")
    form = {"model_type": "variform_encoder", "vocab_size": 330, "pad_token_id": 0, "num_labels": 2, **sizes}
    AutoModelForSequenceClassification.from_config(config_from_dict(form)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    named = {name: folder / name for name in ("bert", "llama", "teacher")}
    return {**places, **named, "encoder_decoder": folder / "pair"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps(path, load_script, stand_ins, tmp_path):
    recipe = yaml.load(path.read_text(encoding="utf-8"), FormLoader)
    form = recipe.get("form", {})
    assert len(recipe) + max(len(form) - 1, 0) <= MOST_KEYS
    assert len(re.findall("^#", path.read_text(encoding="utf-8"), flags=re.MULTILINE)) >= 1
    rows = rows_of(recipe.pop("dataset"), recipe.pop("dataset_config", None))
    data = {"train_files": [write_lines(tmp_path / "train.jsonl", rows[:8])]}
    data["eval_files"] = [write_lines(tmp_path / "eval.jsonl", rows[8:])]
    script = SCRIPTS[path.stem]
    shape = form.get("model_type", "").removeprefix("variform_")
    if recipe.get("tokenizer", "").startswith("runs/"):
        recipe["tokenizer"] = str(stand_ins[{"encoder": "both", "decoder": "start", "encoder_decoder": "end"}[shape]])
    if "student_layers" in recipe:
        recipe["student_layers"] = [0]
    elif "form" not in recipe:
        ours = {"dpo": "decoder", "seq2seq": "encoder_decoder"}.get(script, "encoder")
        start = ours if "model" in recipe else {"causal_lm": "llama"}.get(script, "bert")
        recipe["model"] = str(stand_ins[start])
    if "teacher" in recipe:
        recipe["teacher"] = str(stand_ins["teacher"])
    recipe.pop("minutes", None)
    recipe |= {**data, "output_dir": str(tmp_path / "run"), "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    assert load_script(script).main(["--config", str(tmp_path / "recipe.yaml"), *QUICK]) == 0
    measured = json.loads((Path(recipe["output_dir"]) / "metrics.json").read_text(encoding="utf-8"))
    assert measured["steps"] == 2
