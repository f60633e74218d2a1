"""What a run tells."""

from transformers import TrainingArguments

from variform.training.options import RunArguments
from variform.training.run import Run


def test_brackets_are_told_as_they_are(tmp_path, capsys):
    training = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    run = Run(RunArguments(), training, script=__file__, argv=[], others=[])
    run.say({"split": "words of [a-z'] with at most 20 letters"}, {"cut to [max_length]": 3})
    run.show_scores("Scores", {"F1 [macro]": 50.0})
    said = capsys.readouterr().out
    assert "Split: words of [a-z'] with at most 20 letters." in said
    assert "Examples cut to [max_length]: 3." in said and "F1 [macro]" in said
