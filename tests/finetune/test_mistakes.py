"""What people get wrong at first: each ends with one sentence that names it, status 2, and nothing trained or overwritten."""

import json
import sys

import pytest
from script_inputs import WORDS, form, write_lines

from variform.training.run import run_script

QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_steps", "1", "--max_length", "24"]


@pytest.fixture(scope="module")
def place(tokenizers, tmp_path_factory):
    """A folder with texts, a table, a recipe with a slip, a file that is no folder, and an empty folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    lines = [" ".join(WORDS[(n + 5 * place) % 17] for place in range(6)) + f" {n}" for n in range(20)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_lines(folder / "rows.jsonl", [{"sentence": text, "sort": "ab"[n % 2]} for n, text in enumerate(lines)])
    (folder / "slip.yaml").write_text("max_steps: 3\nlearning_rat: 1e-3\n", encoding="utf-8")
    (folder / "broken.yaml").write_text("form: {hidden_size: 3\n", encoding="utf-8")
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def names(place, tokenizers):
    """What stands in braces below."""
    return {"place": str(place), "both": tokenizers["both"], "encoder": form("encoder"), "decoder": form("decoder")}


def words(command: str, names: dict[str, str]) -> list[str]:
    """A command line, split at spaces, with what its braces stand for."""
    return [word.format(**names) for word in command.split()]


def end(load_script, script: str, argv: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """The exit status of a script as a command, and what it wrote to both streams."""
    monkeypatch.setattr(sys, "argv", [f"finetune/{script}.py", *argv])
    with pytest.raises(SystemExit) as ended:
        run_script(load_script(script).main)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


START = "--train_files {place}/texts.txt --tokenizer {both} --form {encoder} "
MISTAKES = [
    # the command line and the recipe
    ("masked_lm", "", "One of `dataset` and `train_files` says what to train on"),
    ("masked_lm", "recipe.yaml", "`recipe.yaml` belongs to no argument: write `--name recipe.yaml`."),
    ("masked_lm", "--config {place}/none.yaml", "none.yaml`: there is no such file."),
    (
        "masked_lm",
        "--config {place}/slip.yaml",
        "slip.yaml:2: `learning_rat` is not an argument of this script; did you",
    ),
    ("masked_lm", "--config {place}/broken.yaml", "not valid YAML"),
    ("masked_lm", START + "--learning_rate fast", "`learning_rate` must be a number, got 'fast'."),
    ("masked_lm", START + "--lr_scheduler_type cosin", "did you mean `cosine`?"),
    (
        "masked_lm",
        START + "--per_device_train_batch_size 0",
        "`per_device_train_batch_size` must be at least 1, got 0.",
    ),
    ("masked_lm", START + "--max_steps 0", "`max_steps` must be at least 1, or -1 for whole epochs, got 0."),
    ("masked_lm", START + "--max_steps -1 --num_train_epochs 0", "`num_train_epochs` must be above 0, got 0."),
    ("masked_lm", START + "--report_to comet", "`report_to=comet` is not installed; there are none"),
    ("masked_lm", START + "--minutes -1", "`minutes` must be above 0"),
    # data
    ("masked_lm", START + "--train_files {place}/none.txt", "`train_files`: there is no file"),
    ("masked_lm", START + "--train_files {place}", "is a folder; name its files"),
    ("masked_lm", START + "--text_column txt", "has no column `txt`; it has `text`; did you mean `text`?"),
    ("masked_lm", "--dataset shakespear --tokenizer {both} --form {encoder}", "did you mean `shakespeare`?"),
    (
        "classify",
        "--train_files {place}/rows.jsonl",
        "rows.jsonl has no column `label`; it has `sentence`, `sort`: say",
    ),
    # the tokenizer and the model
    ("masked_lm", "--train_files {place}/texts.txt --form {encoder}", "A new model needs a `tokenizer`"),
    (
        "masked_lm",
        START + "--tokenizer {place}/empty",
        "empty` has no tokenizer that loads: the folder holds no tokenizer",
    ),
    ("masked_lm", START + "--tokenizer {place}/none", "none` has no tokenizer that loads: there is no such folder"),
    ("masked_lm", START + "--form {place}/none.yaml", "none.yaml' is neither a file nor one of the forms"),
    ("masked_lm", START + "--form {{hidden_size:", "`form`: '{hidden_size:' is not valid YAML"),
    ("masked_lm", START + "--form {decoder}", "`form` is a variform_decoder; this script trains one of: variform_enc"),
    ("masked_lm", START + "--set hidden_size", "`set` takes FIELD=VALUE, got 'hidden_size'."),
    ("masked_lm", START + "--model {place}/empty", "Give `form`, to train a new model, or `model`, to go on from one"),
    ("masked_lm", "--train_files {place}/texts.txt --tokenizer {both} --model {place}/none", "There is no folder"),
    (
        "masked_lm",
        "--train_files {place}/texts.txt --tokenizer {both} --model {place}/empty",
        "config.json is not there",
    ),
    ("merge_lora", "--adapter {place}/empty", "holds no adapter: adapter_config.json is missing"),
    ("generate", "--model {place}/none --prompts a", "There is no folder"),
    ("evaluate", "--model {place}/none --train_files {place}/texts.txt", "There is no folder"),
    ("distill", "--train_files {place}/texts.txt", "--teacher"),
    # where it goes on
    (
        "masked_lm",
        START + "--resume {place}/none",
        "must be auto, none, or the folder of a checkpoint; it is no folder.",
    ),
    ("masked_lm", START + "--resume {place}/empty", "is not a checkpoint to go on from"),
]


@pytest.mark.parametrize(("script", "command", "sentence"), MISTAKES)
def test_a_mistake_ends_with_one_sentence(
    load_script, names, tmp_path, monkeypatch, capsys, script, command, sentence
):
    quick = [] if script in ("merge_lora", "generate", "evaluate") else QUICK
    given = words(command, names)
    folder = [] if script == "generate" else ["--output_dir", str(tmp_path / "run")]
    argv = [*quick, *folder, *given] if command.startswith("--") else [*given, *quick, *folder]
    status, _, said = end(load_script, script, argv, monkeypatch, capsys)
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sentence in said
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("script", ["masked_lm", "tokenizer", "evaluate"])
def test_an_output_folder_that_is_a_file_is_refused(load_script, names, tmp_path, monkeypatch, capsys, script):
    (tmp_path / "file").write_text("")
    given = ["--train_files", names["place"] + "/texts.txt", "--output_dir", str(tmp_path / "file")]
    given += {"evaluate": ["--model", "any"], "tokenizer": [], "masked_lm": words(START, names)}[script]
    status, _, said = end(load_script, script, given, monkeypatch, capsys)
    assert status == 2 and said.count("\n") == 1
    assert said.startswith(f"error: `output_dir` {tmp_path / 'file'} cannot be written: ")


@pytest.fixture(scope="module")
def trained(load_script, names, place):
    """The folder of a run that came to its end, with a checkpoint of each of its two steps."""
    folder = place / "run"
    assert load_script("masked_lm").main([*words(START, names), *QUICK, "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--per_device_train_batch_size 3", "per_device_train_batch_size: checkpoint 4, now 3: going on from"),
        ("--seed 1", "seed: checkpoint 0, now 1"),
        ("--set hidden_size=32", "model_config.hidden_size: checkpoint 16, now 32"),
        ("--max_train_examples 7", "data_length: checkpoint 18, now 7"),
    ],
)
def test_a_run_that_goes_on_as_another_is_refused(load_script, names, trained, monkeypatch, capsys, change, sentence):
    before = (trained / "model.safetensors").read_bytes()
    go_on = ["--output_dir", str(trained), "--resume", str(trained / "checkpoint-1"), *words(change, names)]
    status, _, said = end(load_script, "masked_lm", [*words(START, names), *QUICK, *go_on], monkeypatch, capsys)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert sentence in said and "--allow_resume_changes" in said
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_score_that_nobody_measures_is_named_by_the_first_evaluation(
    load_script, names, tmp_path, monkeypatch, capsys
):
    best = ["--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "bleu"]
    argv = [*words(START, names), *QUICK, *best, "--load_best_model_at_end", "true", "--output_dir", str(tmp_path)]
    status, _, said = end(load_script, "masked_lm", argv, monkeypatch, capsys)
    assert status == 2 and said.count("\n") == 1 and "'eval_bleu', which is not found" in said


def test_nothing_but_sentences_is_said_where_nobody_watches(load_script, names, tmp_path, monkeypatch, capsys):
    """No bars of libraries in a log; the end of a run, and the same command again."""
    argv = [*words(START, names), *QUICK, "--output_dir", str(tmp_path)]
    for said_of_it in ("Training. Ctrl-C stops and saves.", f"{tmp_path} holds a trained model: nothing to do."):
        status, out, err = end(load_script, "masked_lm", argv, monkeypatch, capsys)
        assert status == 0 and said_of_it in out
        assert err == "" and "\r" not in out
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["steps"] == 2
