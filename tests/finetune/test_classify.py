"""finetune/classify.py: an encoder and a decoder, adapters that are merged, and what is refused."""

import json

import pytest
from huggingface_hub import ModelCard
from script_inputs import WORDS, form, write_lines
from transformers import AutoModelForSequenceClassification

STEPS = ["--max_steps", "3", "--per_device_train_batch_size", "8", "--logging_steps", "1", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Arguments with reviews whose words tell their class."""
    folder = tmp_path_factory.mktemp("reviews")
    examples = [
        {"text": f"{WORDS[n % 17]} the film was {('good', 'bad')[n % 2]} {n}", "label": ("pos", "neg")[n % 2]}
        for n in range(48)
    ]
    train, held_out = (
        write_lines(folder / "train.jsonl", examples[:40]),
        write_lines(folder / "eval.jsonl", examples[40:]),
    )
    return ["--train_files", train, "--eval_files", held_out, "--max_length", "32"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("classify")


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_a_run_tells_its_classes_figures_and_baselines(script, rows, tokenizers, tmp_path, shape, capsys):
    start = ["--form", form(shape), "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path / "run")]
    assert script.main([*rows, *STEPS, *start]) == 0
    said = capsys.readouterr().out
    assert "this model" in said and "TF-IDF, logistic regression" in said and "most frequent class" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert measured["baselines"]["TF-IDF, logistic regression"] == 100 and 0 <= measured["accuracy"] <= 100
    results = ModelCard.load(tmp_path / "run" / "README.md").data.eval_results
    assert [result.metric_type for result in results] == ["accuracy", "f1"]


@pytest.mark.parametrize(
    ("label", "sentence"), [("x", "every example is of the one class 'x'"), (0.14, "`label`: 0.14 is no class")]
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_trained(
    script, tokenizers, tmp_path, label, sentence
):
    lines = "".join(json.dumps({"text": f"text {number}", "label": label}) + "\n" for number in range(40))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=sentence):
        script.main(["--train_files", str(tmp_path / "rows.jsonl"), *STEPS, *start])


def test_adapters_are_merged_into_what_answers_the_same(script, load_script, rows, tokenizers, tmp_path):
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--baselines", "false"]
    assert script.main([*rows, *STEPS, *start, "--output_dir", str(tmp_path / "base")]) == 0
    lora = ["--model", str(tmp_path / "base"), "--use_peft", "true", "--lora_r", "2", "--baselines", "false"]
    assert script.main([*rows, *STEPS, *lora, "--output_dir", str(tmp_path / "lora")]) == 0
    again = [*rows, *STEPS, *lora, "--output_dir", str(tmp_path / "lora")]
    before = json.loads((tmp_path / "lora" / "metrics.json").read_text(encoding="utf-8"))
    assert script.main(again) == 0  # judges what was saved
    assert json.loads((tmp_path / "lora" / "metrics.json").read_text(encoding="utf-8"))["f1"] == before["f1"]

    merge = load_script("merge_lora")
    assert merge.main(["--adapter", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "merged")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    with pytest.raises(FileExistsError, match="exists already"):
        merge.main(["--adapter", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "merged")])


def test_a_column_that_is_not_there_is_refused(script, tokenizers, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "stars": 1}, {"text": "b", "stars": 2}])
    start = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="label"):
        script.main(["--train_files", path, *STEPS, *start])
