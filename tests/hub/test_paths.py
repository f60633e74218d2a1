"""What a card calls files and models of this machine."""

from pathlib import Path

import torch

from variform.hub.paths import model_name, shorten

CARRIED = Path(torch.__file__).parent / "nn"


def test_a_path_is_relative_to_the_working_folder_or_its_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shorten(f"--model {tmp_path}/runs/me --other {tmp_path.parent}/x") == "--model runs/me --other x"


def test_a_path_in_a_package_begins_with_the_package():
    assert shorten(f"--model {CARRIED}") == "--model torch/nn"


def test_a_model_is_called_by_its_repo_its_folder_or_its_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    assert model_name("me/reviews") == "me/reviews"
    assert model_name("runs/reviews") == model_name(str(tmp_path / "runs" / "reviews")) == "reviews"
    assert model_name(str(CARRIED)) == "torch"
    assert model_name("") == ""
