"""What is logged reaches trackers too: speed, gradient and router load beside the loss."""

import os

import pytest
from script_inputs import WORDS, form

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--max_length", "24"]
LOGGED = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "expert_max_load"}


@pytest.fixture
def arguments(tmp_path, tokenizers):
    lines = "\n".join(f"{' '.join(WORDS[n % 7 :])} {n}" for n in range(30))
    (tmp_path / "train.txt").write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "eval.txt").write_text(" ".join(WORDS) + "\n", encoding="utf-8")
    files = ["--train_files", str(tmp_path / "train.txt"), "--eval_files", str(tmp_path / "eval.txt")]
    start = ["--form", form("encoder", num_experts=4), "--tokenizer", tokenizers["both"]]
    return [*files, *start, *STEPS, "--output_dir", str(tmp_path / "run")]


def test_tensorboard(load_script, arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="an extra of its own: track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert load_script("masked_lm").main([*arguments, "--report_to", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert {f"train/{name}" for name in LOGGED} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_trackio(load_script, arguments):
    pytest.importorskip("trackio", reason="an extra of its own: track; it brings a web server")
    from trackio.utils import TRACKIO_DIR

    project = f"variform-test-{os.getpid()}"
    more = ["--report_to", "trackio", "--project", project, "--trackio_static_space_id", "false"]
    try:
        assert load_script("masked_lm").main([*arguments, *more]) == 0
        stored = b"".join(path.read_bytes() for path in TRACKIO_DIR.glob(f"{project}.db*"))
        assert all(name.encode() in stored for name in LOGGED)
    finally:
        for path in TRACKIO_DIR.glob(f"{project}.*"):
            path.unlink()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(load_script, arguments, tmp_path):
    with pytest.raises((ImportError, RuntimeError, ValueError), match="comet"):
        load_script("masked_lm").main([*arguments, "--report_to", "comet_ml"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))
