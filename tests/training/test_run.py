"""What a run tells."""

from transformers import TrainingArguments

from variform.training.arguments import fields_of, parse_recipe
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
