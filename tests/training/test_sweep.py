"""A grid of runs: its combinations, equal FLOPs, seeds, going on, and what is refused before anything is trained."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForSeq2SeqLM

from variform.training import sweep as module
from variform.training.sweep import flops_of_a_step, grid, table

ROOT = Path(__file__).parents[2]
STACK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FORM = json.dumps({"model_type": "variform_decoder", **STACK})


def script_of(name: str):
    spec = importlib.util.spec_from_file_location(f"swept_{name}", ROOT / "finetune" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def script():
    return script_of("causal_lm")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "judged"):
        (folder / f"{name}.txt").write_text(
            f"The {name} fox jumps over a lazy dog, again and again. " * 3, encoding="utf-8"
        )
    files = ["--train_files", str(folder / "train.txt"), "--eval_files", str(folder / "judged.txt")]
    common = [
        "--tokenizer",
        "bytes",
        "--max_length",
        "16",
        "--per_device_train_batch_size",
        "2",
        "--logging_steps",
        "99",
    ]
    return [*files, *common, "--form", FORM, "--save_strategy", "no", "--max_steps", "4"]


@pytest.fixture(scope="module")
def swept(script, texts, tmp_path_factory):
    """The folder of a grid of two choices of layers and two seeds, and how often a run began."""
    folder = tmp_path_factory.mktemp("grid")
    argv = [*texts, "--sweep", "num_hidden_layers=1,3", "seed=0,1", "--output_dir", str(folder)]
    assert script.main(argv) == 0
    return folder, argv


def test_a_grid_trains_each_combination_at_equal_flops(swept):
    folder, _ = swept
    runs = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    names = [(run["choice"]["num_hidden_layers"], run["choice"]["seed"]) for run in runs]
    assert names == [("1", "0"), ("1", "1"), ("3", "0"), ("3", "1")]
    small, large = runs[0]["flops_of_a_step"], runs[2]["flops_of_a_step"]
    assert small < large and [run["steps"] for run in runs] == [4, 4, *[round(4 * small / large)] * 2]
    assert [run["seed"] for run in runs] == [0, 1, 0, 1]
    for run in runs:
        layers, seed = run["choice"].values()
        target = folder / f"num_hidden_layers={layers}-seed={seed}"
        assert json.loads((target / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == int(layers)
        own = json.loads((target / "metrics.json").read_text(encoding="utf-8"))
        assert own["bits_per_byte"] == run["bits_per_byte"] and own["steps"] == run["steps"]
    assert runs[0]["bits_per_byte"] != runs[1]["bits_per_byte"]


def test_the_table_has_a_row_a_choice_with_the_mean_and_the_deviation_of_its_seeds(swept):
    runs = json.loads((swept[0] / "sweep.json").read_text(encoding="utf-8"))
    shown = table(runs)
    assert shown.row_count == 2 and [column.header for column in shown.columns][:2] == ["num_hidden_layers", "seeds"]
    console = Console(width=200, record=True, quiet=True)
    for run, figure in zip(runs, (1.0, 3.0, 2.0, 2.5)):
        run["bits_per_byte"] = figure
    console.quiet = False
    with console.capture() as captured:
        console.print(table(runs))
    said = captured.get()
    assert "2.000 ± 1.414" in said and "2.250 ± 0.354" in said and "deviation over the seeds" in said
    with console.capture() as captured:
        console.print(table(runs[::2]))  # a seed each
    assert "±" not in captured.get() and "1.000" in captured.get()


def test_a_grid_that_was_stopped_goes_on_where_it_was(script, swept, monkeypatch, tmp_path):
    folder, argv = swept
    begun = []

    def main(flags):
        begun.append(flags[flags.index("--output_dir", len(argv)) + 1])
        return script.main(flags)

    (folder / "num_hidden_layers=3-seed=0" / "metrics.json").unlink()
    before = (folder / "sweep.json").read_text(encoding="utf-8")
    parsed = parse(script, argv)
    assert module.sweep(main, argv, parsed, length="max_length") == 0
    assert [Path(path).name for path in begun] == ["num_hidden_layers=3-seed=0"]
    assert figures(json.loads((folder / "sweep.json").read_text(encoding="utf-8"))) == figures(json.loads(before))
    # A run that is stopped stops the grid
    assert (
        module.sweep(
            lambda flags: 130, argv, parse(script, [*argv, "--output_dir", str(tmp_path)]), length="max_length"
        )
        == 130
    )
    # Runs of another grid are not taken for this one's
    with pytest.raises(ValueError, match="holds a run of 4 steps, this grid's has 8: name another `output_dir`"):
        script.main([*argv, "--max_steps", "8"])


def figures(runs: list[dict]) -> list:
    return [(run["choice"], run["steps"], run["bits_per_byte"]) for run in runs]


def parse(script, argv):
    parts = [script.TextArguments, script.DataArguments, script.ModelArguments, script.LoraArguments]
    return script.parse_recipe(
        [*parts, script.RunArguments, script.TrainingArguments], argv, defaults=script.defaults(sample_by="document")
    )


def test_arguments_and_fields_are_swept_together(script, texts, tmp_path, capsys):
    axes = ["per_device_train_batch_size=2,4", "norm_placement=pre,post"]
    argv = [*texts, "--set", "num_hidden_layers=2", "--sweep", *axes, "--output_dir", str(tmp_path)]
    assert script.main([*argv, "--dry_run", "true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" steps")[0].split(": ")[1] for line in said] == [
        "4",
        "4",
        "2",
        "2",
    ]  # half as many of twice the examples
    assert said[0].startswith("per_device_train_batch_size=2-norm_placement=pre: ")
    assert not any(tmp_path.iterdir())
    assert script.main([*argv[:-2], "--max_steps", "2", "--output_dir", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "per_device_train_batch_size=4-norm_placement=post" / "config.json").read_text())
    assert (config["norm_placement"], config["num_hidden_layers"]) == ("post", 2)
    used = (tmp_path / "per_device_train_batch_size=4-norm_placement=post" / "train_config.yaml").read_text()
    assert "per_device_train_batch_size: 4" in used


def test_both_stacks_of_an_encoder_decoder_change_and_letters_are_counted(tmp_path):
    script = script_of("seq2seq")
    rows = [{"text": word, "target": " ".join(word.upper())} for word in ("cab", "bad", "dab", "fade", "beef")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    form = json.dumps({"model_type": "variform_encoder_decoder", "encoder": STACK, "decoder": STACK})
    argv = ["--train_files", str(tmp_path / "rows.jsonl"), "--held_out", "2", "--tokenizer", "letters", "--form", form]
    argv += ["--metrics", "pronunciation", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    argv += ["--minutes", "5", "--sweep", "norm_placement=pre,post", "--output_dir", str(tmp_path / "grid")]
    argv += ["--max_source_length", "16", "--max_target_length", "8"]
    assert script.main(argv) == 0
    for placement in ("pre", "post"):
        config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "grid" / f"norm_placement={placement}").config
        assert config.encoder.norm_placement == config.decoder.norm_placement == placement
        measured = json.loads((tmp_path / "grid" / f"norm_placement={placement}" / "metrics.json").read_text())
        assert measured["steps"] == 2  # and not five minutes


def test_flops_of_a_step_grow_with_batch_accumulation_and_layers(script, texts):
    def flops(*flags):
        return flops_of_a_step(parse(script, [*texts, *flags]), "max_length", None)

    one = flops()
    assert flops("--per_device_train_batch_size", "6") == 3 * one
    assert flops("--gradient_accumulation_steps", "3") == 3 * one
    assert flops("--set", "num_hidden_layers=2") > one
    assert flops("--max_length", "32") > 2 * one  # attention grows faster


def test_a_grid_is_all_combinations():
    choices = grid(["a=1,2", "b=x"], {"a"}, ["c=3"])
    assert [choice.values for choice in choices] == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    assert choices[1].flags == ["--a", "2", "--set", "c=3", "b=x"] and choices[1].name == "a=2-b=x"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sweep", "seed"], "`sweep` takes NAME=A,B,..., got 'seed'"),
        (["--sweep", "seed=0,"], "`sweep` takes NAME=A,B,..., got 'seed=0,'"),
        (["--sweep", "seed=0,0"], "a value comes twice"),
        (["--sweep", "seed=0,1", "seed=2"], "seed comes twice"),
        (["--sweep", "max_steps=1,2"], "`max_steps` is the same for, or decided by, the whole grid"),
        (["--sweep", "learning_rate=1e-3,fast"], "`learning_rate` must be a number, got 'fast'"),
        (["--sweep", "norm_placement=pre,posst"], "posst"),
        (["--sweep", "norm_placment=pre,post"], "norm_placment"),
        (["--sweep", "seed=0,1", "--max_steps", "-1"], "give `max_steps`"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_trained(script, texts, tmp_path, arguments, sentence):
    with pytest.raises(ValueError) as refused:
        script.main([*texts, *arguments, "--output_dir", str(tmp_path)])
    assert sentence in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_a_grid_is_of_new_models_and_of_scripts_that_train_them(script, texts, tmp_path):
    without = [word for number, word in enumerate(texts) if "--form" not in texts[max(0, number - 1) : number + 1]]
    with pytest.raises(ValueError, match="`sweep` needs `form`"):
        script.main([*without, "--model", "x", "--sweep", "seed=0,1", "--output_dir", str(tmp_path)])
    tag = script_of("tag")
    with pytest.raises(ValueError, match="`sweep` is for scripts that train new models"):
        tag.main([*texts[:4], "--sweep", "seed=0,1", "--output_dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())
