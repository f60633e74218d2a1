"""The demo on a handful of words: trained, judged, published, loaded back; stopped and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
SOUNDS = {"a": "AE", "b": "B", "d": "D", "e": "EH", "g": "G", "i": "IH", "n": "N", "o": "AA", "t": "T"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The demo's recipe, with a model of a few thousand parameters and a language of 360 words spelt as they sound."""
    folder = tmp_path_factory.mktemp("demo")
    words = [a + b + c + d for a in "bdgt" for b in "aeio" for c in "bdgnt" for d in ("", "a", "o", "it", "en")][:344]
    rows = []
    for word in words:
        sounds = " ".join(SOUNDS[letter] for letter in word)
        rows.append(json.dumps({"text": word, "target": sounds, "variants": [sounds]}) + "\n")
    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "pronunciation.yaml").read_text(encoding="utf-8"))
    for stack in ("encoder", "decoder"):
        recipe["form"][stack] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    del recipe["dataset"]
    for name, part in {"train_files": rows[20:], "eval_files": rows[:20]}.items():
        recipe[name] = [str(folder / f"{name}.jsonl")]
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    recipe |= {"prompts": ["dot", "gaben"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def start(recipe: Path, output: Path, *arguments: str, processes: int = 1) -> subprocess.Popen:
    """The script in a session of its own, so that a signal to its group is Ctrl-C in a terminal."""
    launcher = ["-m", "variform.training.processes", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "finetune/seq2seq.py", "--config", str(recipe), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes
    )


def test_train_judge_publish_and_load_back(recipe, tmp_path):
    output = tmp_path / "run"
    process = start(recipe, output, "--minutes", "0.05")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "324 to train on, 20 held out" in said
    assert re.search(r"^  dot +[A-Z ]+$", said, flags=re.MULTILINE), said
    assert said.count("the same answers") == 2, said
    card = ModelCard.load(output / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["wer", "per"]
    wer = card.data.eval_results[0].metric_value
    assert f"{wer:.2f}" in said
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["auto_map"]

    again = start(recipe, output, "--prompts", "dot")
    said_again, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said_again
    assert "holds a trained model" in said_again and f"{wer:.2f}" in said_again


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, tmp_path, processes):
    output = tmp_path / "run"
    process = start(recipe, output, "--minutes", "5", "--save_steps", "20", processes=processes)
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoint-*/checkpoint_complete.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    stopped_at = int(re.search(r"Stopped at step (\d+); .*Run the same command again", said).group(1))

    # A budget that was spent before the stop shows that the clock went on
    said, _ = start(recipe, output, "--minutes", "0.001", processes=processes).communicate(timeout=240)
    assert re.search(rf"checkpoint-{stopped_at}: already at .* of 0.001 min, nothing to do", said), said
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == stopped_at


@pytest.mark.parametrize("name", ["pronunciation", "pronunciation_experts", "g2p"])
def test_the_models_of_the_recipes_keep_within_their_size(name):
    import variform

    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    form = recipe["form"]
    for stack in ("encoder", "decoder"):
        form[stack] = {**form[stack], "vocab_size": 70}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    assert variform.from_config({**form, **ids}).num_parameters() <= 3_800_000


def test_a_mistake_in_a_recipe_ends_with_one_sentence(tmp_path):
    (tmp_path / "r.yaml").write_text("form: {}\nminuets: 5\n", encoding="utf-8")
    process = start(tmp_path / "r.yaml", tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "r.yaml:2: `minuets` is not an argument of this script; did you mean `minutes`?" in said
    assert "Traceback" not in said
