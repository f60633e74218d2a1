"""A card says what is known, in the words and in the metadata that the Hub reads, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny import build, tiny
from transformers import AutoModelForCausalLM

import variform
from variform.hub.cards import (
    CardFacts,
    DataSource,
    Figure,
    environment,
    form_facts,
    is_edited,
    make_card,
    write_card,
    write_card_or_warn,
)
from variform.hub.facts import form_as_yaml, git_revision
from variform.hub.pictures import draw_pictures
from variform.report.compare import form_fields


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
    assert {"hardware", "versions"} <= set(environment()) <= {"hardware", "versions", "code"}
    assert all(name in environment()["versions"] for name in ("Python", "torch", "transformers", "Variform"))


def test_the_commit_is_that_of_a_checkout_and_of_nothing_around_it(tmp_path):
    (tmp_path / "module.py").write_text("")
    assert git_revision(tmp_path / "module.py") == ""
    assert re.fullmatch(r"(git commit [0-9a-f]{40}(, with changes .*)?)?", git_revision())


# What the Hub reads


def test_the_metadata_is_what_the_hub_reads(full, tmp_path):
    metadata = metadata_load(write_card(tmp_path, full))
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "speller"
    assert results == make_card(full).data.eval_results
    assert {key: metadata[key] for key in ("language", "license", "library_name")} == {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
    }


def test_a_figure_without_data_is_in_the_table_alone(full):
    full.dataset = ""
    assert make_card(full).data.eval_results is None
    assert "| word error rate, greedy | 33.33 |" in make_card(full).text


def test_units_stand_above_a_column_or_in_its_rows():
    figures = [Figure("bpb", "bits per byte", 1.23456, "bits"), Figure("accuracy", "accuracy", 50.0)]
    one = make_card(CardFacts(name="a", summary="b", figures=figures[:1], baselines={"gzip": 3.40004})).text
    assert "| measured | bits |" in one and "| bits per byte | 1.2346 |" in one and "| gzip | 3.4 |" in one
    both = make_card(CardFacts(name="a", summary="b", figures=figures)).text
    assert "| bits per byte | 1.2346 bits |" in both and "| accuracy | 50.00 % |" in both
    assert "| bleu | 23.46 |" in str(make_card(CardFacts("a", "b", figures=[Figure("bleu", "bleu", 23.45678, "")])))


# What a run knows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved decoder with experts and a window, and a log of its routers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    form = tiny("decoder", attention_patterns=["sliding_window:4", "full"], num_experts=4, num_experts_per_tok=2)
    build(form, AutoModelForCausalLM).save_pretrained(folder)
    layers = {key: {"layer 0": value} for key, value in {"load": [2, 1, 1, 0], "dropped": 0, "choices": 4}.items()}
    (folder / "expert_load.jsonl").write_text("".join(json.dumps({"step": step, **layers}) + "\n" for step in (1, 2)))
    return folder, form


def facts_of(form, **fields):
    return CardFacts(name="run", summary="Writes.", auto_class="AutoModelForCausalLM", **form_facts(form), **fields)


def test_the_form_is_said_in_words_and_as_a_file_that_builds_it(run, tmp_path):
    folder, form = run
    text = make_card(facts_of(form), folder).text
    assert "5,568 parameters, of which a token uses 3,552." in text
    assert re.search(r"^patterns +sliding_window:4, full$", text, re.MULTILINE)
    (tmp_path / "form.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert form_fields(variform.load_config(tmp_path / "form.yaml")) == form_fields(form)


@pytest.mark.parametrize("name", variform.list_forms())
def test_every_form_comes_back_from_its_yaml(name, tmp_path):
    form = variform.load_config(name)
    (tmp_path / "form.yaml").write_text(form_as_yaml(form))
    assert form_fields(variform.load_config(tmp_path / "form.yaml")) == form_fields(form)


def test_pictures_that_are_there_are_shown(run):
    pytest.importorskip("matplotlib", reason="what draws the pictures belongs to the `train` extra")
    folder, form = run
    assert [path.name for path in draw_pictures(folder)] == ["attention_patterns.png", "expert_load.png"]
    (folder / "plots" / "loss.png").write_bytes((folder / "expert_load.png").read_bytes())
    shown = re.findall(r"!\[(.*)\]\((.*)\)", make_card(facts_of(form, training={"steps": "7"}), folder).text)
    assert {path: words for words, path in shown} == {
        "plots/loss.png": "Loss",
        "expert_load.png": "How the tokens were shared out among the experts while the model trained",
        "plots/attention_patterns.png": "Which query sees which key, in each distinct layer",
    }
    assert all((folder / path).is_file() for _, path in shown)


def test_what_was_converted_adapted_and_checked_is_said(run):
    _, form = run
    form.origin = {"model_type": "llama", "pretraining_tp": 1}
    sources = [DataSource("books", sha256="ab" * 32, license="CC0-1.0", size="3 books")]
    text = make_card(
        facts_of(form, base_model="me/base", adapters={"LoRA": "rank 8; merged"}, sources=sources), None
    ).text
    form.origin = None
    for words in (
        "came from a native `llama` model",
        "`pretraining_tp`",
        "started from me/base",
        "- LoRA: rank 8; merged",
        f"| books | 3 books | CC0-1.0 | `{'ab' * 32}` |",
        "- Which training texts come back word for word",
    ):
        assert words in text
    assert make_card(facts_of(form, base_model="me/base")).data.base_model == "me/base"


def test_no_line_is_a_form_to_fill_in(run):
    text = make_card(facts_of(run[1])).content.lower()
    assert "more information needed" not in text
    assert "none" not in text.replace("dropout          none", "")


def test_no_path_of_this_machine_is_in_a_card(run, tmp_path):
    folder, form = run
    command = f"python x.py --output_dir {folder} --config {Path.cwd() / 'configs/a.yaml'} --files={tmp_path}/*.txt"
    facts = facts_of(
        form, command=command, data={"source": f"{tmp_path}/words.txt"}, sources=[DataSource(str(tmp_path))]
    )
    facts.metadata = {"datasets": [str(tmp_path)], "tags": ["a/b"]}
    text = make_card(facts, folder).content
    for path in (folder, folder.parent, tmp_path, Path.cwd(), Path.home()):
        assert f"{path}/" not in text and f"{path}\n" not in text
    assert "python x.py --output_dir run --config configs/a.yaml --files=*.txt" in text
    assert "- source: words.txt" in text and "a/b" in text
    assert make_card(CardFacts(name="n", summary="See https://example.org/tmp/x and/or 1/2.")).text.count("/") == 6


# Written, kept, and not in the way


def test_facts_come_back(full, tmp_path):
    full.sources, full.example = [DataSource("books", size="3")], ["a", ["b", "c"]]
    write_card(tmp_path, full)
    assert CardFacts.load(tmp_path) == full


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "a", "summary": "b", "colour": "c"}'])
def test_facts_that_are_none_are_refused_by_file(text, tmp_path):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=r"card\.json does not hold the facts of a card"):
        CardFacts.load(tmp_path)


def test_a_card_that_somebody_edited_is_known(full, tmp_path):
    assert not is_edited(tmp_path)
    path = write_card(tmp_path, full)
    assert not is_edited(tmp_path)
    path.write_text(path.read_text() + "One more word.\n")
    assert is_edited(tmp_path)
    (tmp_path / "card.json").unlink()
    assert is_edited(tmp_path)
    path.write_text("## Bias\n\n[More Information Needed]\n")
    assert not is_edited(tmp_path)


def test_a_card_that_cannot_be_made_is_a_warning(full, tmp_path, caplog):
    def without_figures():
        raise KeyError("eval_wer")

    def without_a_class():
        full.auto_class = "AutoModelForSinging"
        return full

    for make_facts, reason in ((without_figures, "eval_wer"), (without_a_class, "AutoModelForSinging")):
        assert write_card_or_warn(tmp_path, make_facts) is None
        assert "is saved; its card is not" in caplog.text and reason in caplog.text
    assert list(tmp_path.iterdir()) == []
    full.auto_class = ""
    assert write_card_or_warn(tmp_path, lambda: full) == tmp_path / "README.md"
