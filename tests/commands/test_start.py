"""The console script begins without torch: help is a matter of tenths of a second."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import variform
from variform import commands
from variform.cli import main

COMMANDS = sorted({module.name for module in pkgutil.iter_modules(commands.__path__)} - {"reading"})
SOURCE = Path(variform.__file__).parents[1]
# Says what was imported, after the script has said what it has to say
START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import variform_command
try:
    status = variform_command.main()
except SystemExit as ended:
    status = ended.code
print(*sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def start(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", START, str(SOURCE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_neither_torch_nor_transformers(words):
    said = start(*words)
    assert (said.returncode, said.stderr.strip()) == (0, "")
    assert said.stdout.startswith("usage: variform") and "examples:" in said.stdout


def test_the_package_is_there_when_a_command_asks_for_it():
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import variform_command;"
        "sys.modules['variform'] = variform_command.package_on_demand(); import variform;"
        "assert 'torch' not in sys.modules;"
        "from variform.light import light; assert 'torch' not in sys.modules;"
        "print(len(variform.list_forms()), variform.VariformDecoderConfig.__name__);"
        "from transformers import AutoConfig; print(AutoConfig.for_model('variform_decoder').model_type)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == [str(len(variform.list_forms())), "VariformDecoderConfig", "variform_decoder"], (
        said.stderr
    )


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n    {name} " not in said] == []


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
def test_info_of_a_config_imports_neither_torch_nor_transformers(shape, tmp_path, capsys):
    variform.forms.config_from_dict({"model_type": f"variform_{shape}"}).save_pretrained(tmp_path)
    said = start("info", tmp_path / "config.json")
    assert (said.returncode, said.stderr.strip()) == (0, "")
    assert main(["info", str(tmp_path)]) == 0
    assert said.stdout.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:]  # all but the name


@pytest.mark.parametrize("name", variform.list_forms())
def test_info_of_a_published_form_imports_neither_torch_nor_transformers(name):
    said = start("info", name)
    assert (said.returncode, said.stderr.strip()) == (0, "")
    assert said.stdout.startswith(f"{name}, ") and "\nparameters" in said.stdout


def test_info_of_two_forms_imports_neither_torch_nor_transformers():
    said = start("info", "gpt-oss-20b", "bigbird-base")
    assert (said.returncode, said.stderr.strip()) == (0, "")
    assert said.stdout.startswith("From gpt-oss-20b to bigbird-base: what each change alone adds")


def test_info_of_a_refused_form_shows_the_nearest_valid_one_without_torch_and_transformers(tmp_path):
    (tmp_path / "form.yaml").write_text("model_type: variform_encoder\nhidden_size: 30\nvocab_size: 100\n")
    said = start("info", tmp_path / "form.yaml")
    assert said.returncode == 2
    refusal, *rest = said.stderr.splitlines()
    assert refusal.startswith("error: `hidden_size=30` is not a multiple of `num_attention_heads=8`")
    assert rest == ["The nearest form that builds:", "-hidden_size: 30", "+hidden_size: 32", ""]


def test_info_of_what_is_not_there_names_the_nearest_form():
    said = start("info", "bert-bse")
    assert said.returncode == 2
    assert said.stderr.startswith("error: 'bert-bse' is neither") and said.stderr.endswith("'bert-base'?\n\n")


def test_info_asks_the_real_classes_where_transformers_would_warn(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}
    (tmp_path / "form.json").write_text(json.dumps({"model_type": "variform_decoder", "rope_parameters": rope}))
    said = start("info", tmp_path / "form.json")
    assert said.returncode == 0 and "linear, base 10,000, factor 0.5" in said.stdout
    assert "factor field must be a float or int >= 1" in said.stderr and said.stderr.endswith("torch transformers\n")
