"""finetune/tokenizer.py: what is written, what is measured, and what is not overwritten."""

import json

import pytest
from script_inputs import WORDS, write_lines
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("tokenizer")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        {"text": " ".join(WORDS[(n + 5 * place) % 18] for place in range(6)), "target": f"été {n}"} for n in range(30)
    ]
    held_out = [{"text": "the end of a film", "target": "été"}, {"text": "a", "target": "naïve été"}]
    files = ["--train_files", write_lines(folder / "train.jsonl", rows)]
    return [*files, "--eval_files", write_lines(folder / "eval.jsonl", held_out)]


def test_its_figures_are_those_of_texts_that_it_has_not_seen(script, texts, tmp_path, capsys):
    columns = ["--text_columns", "text", "target", "--frame", "end", "--sentinels", "2", "--model_max_length", "64"]
    assert script.main([*texts, *columns, "--vocab_size", "320", "--output_dir", str(tmp_path / "new")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(tokenizer) <= 320 and tokenizer.model_max_length == 64
    assert tokenizer("a film")["input_ids"][-1] == tokenizer.eos_token_id
    assert {"<extra_id_0>", "<extra_id_1>"} <= set(tokenizer.get_vocab())
    judged = ["the end of a film", "été", "a", "naïve été"]
    lengths = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in judged)
    measured = json.loads((tmp_path / "new" / "metrics.json").read_text(encoding="utf-8"))
    assert measured == {
        "bytes_per_token": sum(len(text.encode()) for text in judged) / sum(lengths),
        "tokens_of_a_text_median": lengths[2],
        "tokens_of_a_text_99_of_100": lengths[3],
        "texts_that_come_back_exactly_%": 100.0,
    }
    said = capsys.readouterr().out
    assert f"{len(tokenizer):,} tokens" in said and "bytes per token" in said and "30 to train on, 2 held out" in said
    # A longer vocabulary packs better; and what is learned is of the training part alone
    assert script.main([*texts, *columns, "--vocab_size", "264", "--output_dir", str(tmp_path / "small")]) == 0
    small = json.loads((tmp_path / "small" / "metrics.json").read_text(encoding="utf-8"))
    assert small["bytes_per_token"] < measured["bytes_per_token"]
    assert not any("naïve" in tokenizer.decode([index]) for index in range(len(tokenizer)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vocab_size", "200"], "`vocab_size=200` must be at least 261"),
        (["--text_columns", "words"], "words"),
        (["--frame", "ends"], "`frame` must be one of both, end, start, none, got 'ends'; did you mean `end`"),
    ],
)
def test_mistakes_leave_no_folder_behind(script, texts, tmp_path, arguments, sentence):
    with pytest.raises(ValueError) as refused:
        script.main([*texts, "--output_dir", str(tmp_path / "new"), *arguments])
    assert sentence in str(refused.value) and not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_as_it_is(script, texts, tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty: a tokenizer there would be overwritten; name a new folder"):
        script.main([*texts, "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == "mine"
