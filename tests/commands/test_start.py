"""The console script begins without torch: help is a matter of tenths of a second."""

import subprocess
import sys
from pathlib import Path

import pytest

import variform
from variform.cli import COMMANDS, main

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
