"""A recipe and the command line are one list of arguments."""

from dataclasses import dataclass, field

import pytest

from variform.training.arguments import parse_recipe


@dataclass
class Arguments:
    learning_rate: float = 0.1
    epochs: int = 1
    shuffle: bool = False
    name: str | None = None
    beams: list[int] = field(default_factory=lambda: [1])
    form: str | None = None


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


def test_a_value_that_does_not_fit_is_refused(parse, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("learning_rate: fast\n")
    assert stopped.value.code == 2
    assert "invalid float value: 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "just words\n"])
def test_a_recipe_that_is_no_mapping_is_refused(parse, text):
    with pytest.raises(ValueError, match="must hold `name: value` lines"):
        parse(text)


def test_broken_yaml_is_refused(parse):
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse("a: [1, 2\nb: 3\n")


def test_a_missing_recipe_is_refused():
    with pytest.raises(ValueError, match="there is no such file"):
        parse_recipe([Arguments], ["--config", "nowhere.yaml"])


def test_a_flag_without_recipe_is_refused():
    with pytest.raises(ValueError, match="`--config` needs a file"):
        parse_recipe([Arguments], ["--config"])
