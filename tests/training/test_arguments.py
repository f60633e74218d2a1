"""A recipe and the command line are one list of arguments."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import TrainingArguments

from variform.training.arguments import fields_of, parse_recipe
from variform.training.options import RunArguments


@dataclass
class Arguments:
    learning_rate: float = 0.1
    epochs: int = 1
    shuffle: bool = False
    name: str | None = None
    beams: list[int] = field(default_factory=lambda: [1])
    form: str | None = None
    clock: Literal["wall", "process"] = "wall"


@pytest.fixture
def parse(tmp_path):
    def parse_text(text: str, *argv: str) -> Arguments:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_recipe([Arguments], ["--config", str(path), *argv])[0]

    return parse_text


def test_values_take_the_type_of_their_field(parse):
    parsed = parse("learning_rate: 1e-3\nepochs: 3\nshuffle: true\nname: 7\nbeams: [1, 5]\n")
    assert parsed == Arguments(learning_rate=1e-3, epochs=3, shuffle=True, name="7", beams=[1, 5])


def test_a_mapping_arrives_as_json(parse):
    assert parse("form: {encoder: {hidden_size: 8}}\n").form == '{"encoder": {"hidden_size": 8}}'


def test_null_is_the_default(parse):
    assert parse("name: null\nepochs: 2\n") == Arguments(epochs=2)


def test_the_command_line_wins(parse):
    assert parse("epochs: 3\nlearning_rate: 0.5\n", "--epochs", "4") == Arguments(epochs=4, learning_rate=0.5)


def test_a_command_line_alone_is_enough():
    assert parse_recipe([Arguments], ["--epochs=5"])[0].epochs == 5


def test_the_recipe_may_follow_an_equals_sign(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 9\n", encoding="utf-8")
    assert parse_recipe([Arguments], [f"--config={tmp_path / 'r.yaml'}"])[0].epochs == 9


def test_a_misspelt_name_is_refused_with_its_line(parse):
    with pytest.raises(ValueError, match=r"recipe.yaml:2: `lerning_rate` .* did you mean `learning_rate`\?"):
        parse("epochs: 3\nlerning_rate: 0.5\n")


def test_a_misspelt_flag_is_refused():
    with pytest.raises(ValueError, match=r"`--epoch_s` .* did you mean `epochs`\?"):
        parse_recipe([Arguments], ["--epoch_s", "3"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("learning_rate: fast", "`learning_rate` must be a number, got 'fast'"),
        ("epochs: 1.5", "`epochs` must be a whole number, got '1.5'"),
        ("shuffle: perhaps", "`shuffle` must be true or false, got 'perhaps'"),
        ("clock: wal", "`clock` must be one of wall, process, got 'wal'; did you mean `wall`?"),
        ("epochs: [1, 2]", "`epochs` takes one value, got 1 2"),
        ("epochs: 1\nepochs: 2", "`epochs` is given twice"),
        ("a: [1, 2\nb: 3", "not valid YAML"),
        ("form:\n\tencoder: 1", "not valid YAML"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_line(parse, line, sentence):
    with pytest.raises(ValueError, match=rf"recipe.yaml:\d+: .*{re.escape(sentence)}"):
        parse(f"name: x\n{line}\n")
    if "\n" not in line and "[" not in line:
        name, word = line.split(": ")
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            parse_recipe([Arguments], [f"--{name}", word])


@pytest.mark.parametrize("word", ["yes", "no", "true", "False", "1"])
def test_words_for_truth(parse, word):
    assert parse(f"shuffle: {word}\n").shuffle == (word in ("yes", "true", "1"))


def test_the_arguments_can_be_printed_with_their_origin_and_read_again(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 3\nform: {encoder: {hidden_size: 8}}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        argv = ["--config", str(recipe), "--beams", "2", "3", "--print_config"]
        parse_recipe([Arguments], argv, defaults={"shuffle": "true"})
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"epochs: 3  # {recipe}:1" in printed and "beams: [2, 3]  # command line" in printed
    assert "shuffle: true  # script" in printed and "learning_rate: 0.1  # default" in printed
    again = tmp_path / "again.yaml"
    again.write_text(printed, encoding="utf-8")
    form = '{"encoder": {"hidden_size": 8}}'
    assert parse_recipe([Arguments], ["--config", str(again)])[0] == Arguments(
        epochs=3, beams=[2, 3], shuffle=True, form=form
    )


def test_what_a_script_says_gives_way_to_a_recipe(parse, tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 9\n", encoding="utf-8")
    argv = ["--config", str(tmp_path / "r.yaml")]
    parsed = parse_recipe([Arguments], argv, defaults={"epochs": "7", "shuffle": "true", "elsewhere": "1"})[0]
    assert parsed == Arguments(epochs=9, shuffle=True)


def test_a_word_without_a_flag_is_refused():
    with pytest.raises(ValueError, match="`3` belongs to no argument"):
        parse_recipe([Arguments], ["3"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "just words\n"])
def test_a_recipe_that_is_no_mapping_is_refused(parse, text):
    with pytest.raises(ValueError, match="must hold `name: value` lines"):
        parse(text)


def test_a_missing_recipe_is_refused():
    with pytest.raises(ValueError, match="there is no such file"):
        parse_recipe([Arguments], ["--config", "nowhere.yaml"])


def test_a_flag_without_recipe_is_refused():
    with pytest.raises(ValueError, match="`config` needs a value"):
        parse_recipe([Arguments], ["--config"])


@dataclass
class Needs:
    teacher: str
    words: list[str] = field(default_factory=list)
    report: None | str | list[str] = None  # noqa: RUF036 - in the order of TrainingArguments, which is all that is read


@pytest.mark.parametrize("words", [["-a", "--b", "c d"], ["-1"], []])
def test_words_of_a_recipe_are_no_flags(tmp_path, words):
    (tmp_path / "r.yaml").write_text(f"teacher: -x\nwords: {words}\nreport: {words}\n", encoding="utf-8")
    (parsed,) = parse_recipe([Needs], ["--config", str(tmp_path / "r.yaml")])
    assert (parsed.teacher, parsed.words) == ("-x", words)
    assert parsed.report == (words[0] if len(words) == 1 else words)


def test_help_tells_defaults_and_whose_they_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(
            [RunArguments, TrainingArguments], ["--help"], defaults={"seed": "7"}, description="What\n  it does."
        )
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "What\n  it does." in said
    assert "(default: 7)" in said and "(default: wall)" in said
    places = [said.index(word) for word in ("RunArguments:", "  --clock", "TrainingArguments:", "  --optim ")]
    assert places == sorted(places)


def test_what_must_be_given_is_asked_for():
    with pytest.raises(ValueError, match="`--teacher` must be given"):
        parse_recipe([Needs], [])


def test_trainers_arguments_survive_printing_and_reading(tmp_path, capsys):
    """With all that Trainer makes of them when they are read: objects for mappings, lists for words."""
    parts = [RunArguments, TrainingArguments]
    given = [
        "--output_dir",
        str(tmp_path / "run"),
        "--learning_rate",
        "2e-4",
        "--report_to",
        "tensorboard",
        "--sweep",
        "a=1,2",
    ]
    given += [
        "--accelerator_config",
        '{"split_batches": true}',
        "--no_log_on_each_node",
        "--lr_scheduler_type",
        "cosine",
    ]
    with pytest.raises(SystemExit):
        parse_recipe(parts, [*given, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    once, again = parse_recipe(parts, given), parse_recipe(parts, ["--config", str(tmp_path / "printed.yaml")])
    assert again[1].accelerator_config.split_batches and not again[1].log_on_each_node
    assert [fields_of(part) for part in again] == [fields_of(part) for part in once]
