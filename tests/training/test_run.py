"""What a run tells."""

import pytest
from transformers import TrainingArguments

from variform.training.arguments import fields_of, parse_recipe
from variform.training.checkpoints import commit
from variform.training.data.arguments import DataArguments
from variform.training.options import ModelArguments, RunArguments
from variform.training.run import Run


def test_brackets_are_told_as_they_are(tmp_path, capsys):
    training = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    run = Run(RunArguments(), training, script=__file__, argv=[], others=[])
    run.say({"split": "words of [a-z'] with at most 20 letters"}, {"cut to [max_length]": 3})
    run.show_scores("Scores", {"F1 [macro]": 50.0})
    said = capsys.readouterr().out
    assert "Split: words of [a-z'] with at most 20 letters." in said
    assert "Examples cut to [max_length]: 3." in said and "F1 [macro]" in said


def test_the_recipe_that_a_run_leaves_gives_its_arguments_again(tmp_path):
    """As they were given, not as a run by the clock changes Trainer's."""
    parts = [ModelArguments, RunArguments, TrainingArguments]
    given = ["--output_dir", str(tmp_path / "run"), "--minutes", "5", "--model", "a b", "--report_to", "tensorboard"]
    start, options, training = parse_recipe(parts, [*given, "--use_cpu", "true", "--num_train_epochs", "2"])
    Run(options, training, script=__file__, argv=given, others=[start])
    assert training.num_train_epochs == 1_000_000
    again = parse_recipe(parts, ["--config", str(tmp_path / "run" / "train_config.yaml")])
    assert (again[0], again[1], again[2].num_train_epochs, again[2].report_to) == (start, options, 2, ["tensorboard"])
    assert fields_of(again[2]) == fields_of(
        parse_recipe(parts, [*given, "--use_cpu", "true", "--num_train_epochs", "2"])[2]
    )


def test_a_trained_model_is_judged_again_as_what_it_is(tmp_path, capsys):
    """With the command that trained it, and refused where the new one would have trained another."""
    parts = [ModelArguments, DataArguments, RunArguments, TrainingArguments]
    folder = tmp_path / "run"
    first = ["--output_dir", str(folder), "--use_cpu", "true", "--model", "a", "--train_files", "two\nlines.txt"]

    def run(*more: str) -> Run:
        model, data, options, training = parse_recipe(parts, [*first, *more])
        return Run(options, training, script="classify.py", argv=[*first, *more], others=[model, data])

    command = run().command
    (folder / "model.safetensors").write_bytes(b"x")
    commit(folder, {})
    again = run("--eval_files", "other.txt", "--per_device_eval_batch_size", "3")
    assert again.trained == folder and again.command == command
    for change in (["--learning_rate", "5"], ["--split_seed", "7"], ["--model", "b"]):
        with pytest.raises(ValueError, match=rf"was trained otherwise: {change[0][2:]}: then .*, now {change[1]}"):
            run(*change)
    assert run("--max_steps", "600").command == command
    assert "Note: the model is one of `max_steps: -1`, not 600." in capsys.readouterr().out
    assert run("--split_seed", "7", "--allow_resume_changes", "split_seed").trained == folder
    assert run("--learning_rate", "5", "--resume", "none").trained is None
