"""A card says what is known, in the words and in the metadata that the Hub reads, and nothing else."""

import pytest
import yaml
from huggingface_hub import ModelCard

from variform.hub.cards import CardFacts, Figure, environment, make_card, write_card


@pytest.fixture
def full():
    return CardFacts(
        name="speller",
        summary="Pronounces words.",
        usage="print('hello')",
        task="text2text-generation",
        dataset="cmudict",
        evaluated_on="CMUdict, 3 held-out words",
        figures=[Figure("wer", "word error rate, greedy", 33.333), Figure("wer", "word error rate, beam 5", 30.0)],
        published={"somebody's": 31.0},
        published_source="their README",
        data={"words": "3"},
        training={"steps": "7"},
        command="python train.py --seed 0",
        form="model_type: variform_encoder_decoder",
        limits="Three words.",
        metadata={"language": "en", "license": "apache-2.0", "tags": ["variform"]},
    )


def test_figures_are_in_the_model_index(full):
    results = make_card(full).data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("wer", "word error rate, greedy", 33.33),
        ("wer", "word error rate, beam 5", 30.0),
    ]
    assert results[0].dataset_name == "CMUdict, 3 held-out words"


def test_everything_known_is_said(full):
    text = make_card(full).text
    said = ["# speller", "Pronounces words.", "print('hello')", "| word error rate, greedy | 33.33 |", "their README"]
    said += ["| somebody's | 31.0 |", "- words: 3", "- steps: 7", "--seed 0", "model_type:", "Three words."]
    assert [line for line in said if line not in text] == []


def test_tables_and_headings_stand_on_lines_of_their_own(full):
    lines = make_card(full).text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            assert lines[number + 1] == "" and lines[number - 1] == ""
    table = lines.index("| CMUdict, 3 held-out words | % |")
    assert lines[table - 1] == ""
    assert [line.startswith("|") for line in lines[table : table + 5]] == [True] * 4 + [False]


def test_what_is_unknown_is_left_out():
    card = make_card(CardFacts(name="bare", summary="Does nothing yet."))
    assert yaml.safe_load(card.data.to_yaml()) == {"library_name": "transformers", "model_name": "bare"}
    assert card.text.split() == ["#", "bare", "Does", "nothing", "yet."]


def test_the_card_is_where_the_hub_looks_for_it(full, tmp_path):
    path = write_card(tmp_path, full)
    assert path == tmp_path / "README.md"
    assert ModelCard.load(path).data.license == "apache-2.0"


def test_the_environment_names_hardware_and_versions():
    assert set(environment()) == {"hardware", "versions"}
    assert "torch" in environment()["versions"]
