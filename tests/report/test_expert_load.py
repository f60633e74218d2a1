"""The heat map says what the file says."""

import json

import pytest
import torch

from variform.report.expert_load import draw_expert_load, edges_of, read_expert_load, save_heat_map


def write(folder, lines):
    (folder / "expert_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path):
    line = {"dropped": {"a": 0, "b": 5}, "choices": {"a": 20, "b": 20}}
    first = {"step": 5, "load": {"a": [5, 5, 5, 5], "b": [20, 0]}, **line}
    last = {"step": 10, "load": {"a": [10, 0, 5, 5], "b": [0, 0]}, **line}
    return write(tmp_path, [first, last])


def test_load_is_in_even_shares(run):
    first, second = read_expert_load(run)
    assert (first.name, first.steps) == ("a", [5, 10])
    assert first.load.tolist() == [[1, 1, 1, 1], [2, 0, 1, 1]]
    assert second.load.tolist() == [[2, 0], [0, 0]]
    assert second.dropped.tolist() == [0.25, 0.25]


def test_picture_has_a_panel_a_layer(run, tmp_path):
    figure = draw_expert_load(run / "expert_load.jsonl", path=tmp_path / "load.png")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    assert "25% dropped" in panels[1].get_xlabel() and "dropped" not in panels[0].get_xlabel()
    shown = torch.as_tensor(panels[0].collections[0].get_array().data).view(4, 2)
    assert shown.T.tolist() == [[1, 1, 1, 1], [2, 0.25, 1, 1]]  # the scale ends at a quarter
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_a_column_begins_where_the_one_before_ended():
    assert edges_of([10, 20, 25]) == [0, 10, 20, 25]
    assert edges_of([7]) == [6, 7]


@pytest.mark.parametrize("lines, told", [(None, "does not exist"), ([], "is empty")])
def test_nothing_to_draw_is_told(lines, told, tmp_path):
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(ValueError, match=told):
        draw_expert_load(tmp_path)


def test_other_files_are_refused(run):
    with pytest.raises(ValueError, match="must end in"):
        draw_expert_load(run, path="load.pdf")


def test_the_picture_stands_beside_the_file(run, tmp_path):
    assert save_heat_map(run) == run / "expert_load.png"
    assert save_heat_map(tmp_path / "elsewhere") is None
