"""The commands that finetune/README.md and the scripts themselves show are ones that their scripts take."""

import re
import shlex

import pytest
from script_inputs import ROOT

FINETUNE = ROOT / "finetune"
README = (FINETUNE / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in FINETUNE.glob("*.py"))


def commands(text: str) -> list[str]:
    """The lines with a script in them, those that go on joined."""
    lines = re.sub(r"\\+\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(python|torchrun) .*finetune/\w+\.py ", line)]


SHOWN = [line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in commands(block)]
TOLD = [
    line
    for name in SCRIPTS
    for line in commands((FINETUNE / f"{name}.py").read_text(encoding="utf-8").split('"""')[1])
]


def test_the_table_names_every_script():
    assert sorted(re.findall(r"^\| `(\w+)\.py` \|", README, flags=re.MULTILINE)) == SCRIPTS


def test_every_script_shows_itself_at_work():
    assert {re.search(r"finetune/(\w+)\.py", line).group(1) for line in TOLD} == set(SCRIPTS)


@pytest.mark.parametrize("line", [*SHOWN, *TOLD])
def test_a_command_is_one_that_its_script_takes(load_script, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    place = next(number for number, word in enumerate(words) if word.startswith("finetune/"))
    argv = words[place + 1 :]
    argv = argv[: argv.index("<")] if "<" in argv else argv
    script = load_script(words[place].removeprefix("finetune/").removesuffix(".py"))
    with pytest.raises(SystemExit) as ended:
        script.main([*argv, "--print_config"])
    assert ended.value.code == 0
    assert re.search("  # (command line|default)$", capsys.readouterr().out, flags=re.MULTILINE)


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links and all((FINETUNE / link).exists() for link in links)
