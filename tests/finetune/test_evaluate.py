"""finetune/evaluate.py: figures that are those of plain loops, the harness, and a name that hides no library."""

import json
import math
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from script_inputs import ROOT, WORDS, form, write_lines
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import variform
from variform.training.evaluation.few_shot import Template, answer_questions
from variform.training.evaluation.harness import judge_by_harness
from variform.training.evaluation.metrics import import_evaluate


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("evaluate")


@pytest.fixture(scope="module")
def decoder(tokenizers, tmp_path_factory):
    """A new model, its tokenizer and their folder."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    ids = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = variform.from_config({**json.loads(form("decoder", initializer_range=0.5)), **ids}).eval()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["start"])
    tokenizer.save_pretrained(folder)
    return model, tokenizer, str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Files of texts with classes."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = [{"text": f"{WORDS[n % 17]} {n} film", "label": ("bad", "good")[n % 2]} for n in range(24)]
    return [write_lines(folder / "train.jsonl", rows[:16]), write_lines(folder / "eval.jsonl", rows[16:])]


def figures(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_texts_are_judged_by_every_token_once(script, decoder, tmp_path, capsys):
    model, tokenizer, folder = decoder
    text = " ".join(WORDS) + " \u00e9t\u00e9"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    given = ["--eval_files", str(tmp_path / "text.txt"), "--sample_by", "document", "--max_length", "500"]
    assert script.main(["--model", folder, *given, "--output_dir", str(tmp_path / "out")]) == 0
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    measured = figures(tmp_path / "out")
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / (ids.shape[1] - 1)), rel=1e-5)
    assert measured["parameters"] == model.num_parameters() and "gzip -9" in measured["baselines"]
    assert "this model" in capsys.readouterr().out


def test_a_native_checkpoint_is_judged_alike_however_it_is_cut_into_windows(script, tokenizers, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(" ".join(WORDS), encoding="utf-8")
    given = ["--model", str(tmp_path / "llama"), "--tokenizer", tokenizers["start"]]
    given += ["--eval_files", str(tmp_path / "text.txt"), "--max_length", "8", "--eval_stride", "1"]
    for size in ("1", "7"):
        assert script.main([*given, "--batch_size", size, "--output_dir", str(tmp_path / size)]) == 0
    bits = [figures(tmp_path / size)["bits_per_byte"] for size in ("1", "7")]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_classes_are_told_by_examples_in_the_prompt(script, decoder, reviews, tmp_path, capsys):
    model, tokenizer, folder = decoder
    given = ["--train_files", reviews[0], "--eval_files", reviews[1], "--template", "{text}\\n= {label}\\n"]
    shots = ["--few_shot", "0", "2", "4", "--shot_seeds", "0", "1", "--label_words", "dull", "bright"]
    given += ["--task", "classify", *shots, "--model", folder]
    assert script.main([*given, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "4 examples, seed 1" in said and "most frequent class" in said
    curve = figures(tmp_path)["accuracy"]
    assert {shots: len(point["draws"]) for shots, point in curve.items()} == {"0": 1, "2": 2, "4": 2}
    rows = [json.loads(line) for line in Path(reviews[1]).read_text(encoding="utf-8").splitlines()]
    template = Template.read("{text}\n= {label}\n", ["dull", "bright"])
    found = answer_questions(model, tokenizer, template, [], [row["text"] for row in rows])
    right = sum(("bad", "good")[answer] == row["label"] for answer, row in zip(found, rows))
    assert curve["0"]["mean"] == pytest.approx(100 * right / len(rows))
    assert (tmp_path / "plots" / "few_shot.png").is_file() or find_spec("matplotlib") is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "`dataset` or `eval_files` says what to judge by, or `lm_eval` names tasks"),
        (["--task", "classify", "--eval_files", "{eval}"], "takes its examples from data to train on"),
        (["--few_shot", "2", "--eval_files", "{eval}"], "add `--task classify`, or `lm_eval`"),
        (["--task", "classify", "--train_files", "{eval}", "--few_shot", "-1"], "`few_shot` counts examples"),
        (["--task", "classify", "--train_files", "{eval}", "--template", "{{text}}"], "`template` must have"),
        (
            ["--task", "classify", "--train_files", "{eval}", "--label_words", "one"],
            "must name the 2 classes bad, good",
        ),
        (
            ["--task", "classify", "--train_files", "{eval}", "--few_shot", "20"],
            "`few_shot=20` asks for more examples",
        ),
        (["--eval_files", "{eval}", "--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        (["--lm_eval", "a", "--few_shot", "0", "1"], "`lm_eval` takes one number as `few_shot`"),
    ],
)
def test_mistakes_are_refused(script, decoder, reviews, tmp_path, arguments, sentence):
    given = [word.replace("{eval}", reviews[1]).replace("{{", "{").replace("}}", "}") for word in arguments]
    with pytest.raises(ValueError) as refused:
        script.main(["--model", decoder[2], *given, "--output_dir", str(tmp_path / "out")])
    assert sentence in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_figures_that_are_there_are_not_overwritten(script, tmp_path):
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.json exists already: name another `output_dir`"):
        script.main(["--model", "any", "--output_dir", str(tmp_path)])


class TestHarness:
    @pytest.fixture
    def stand_in(self, monkeypatch):
        """A package with the entry points of lm-eval; what it is called with is in the list."""
        called = []

        class HFLM:
            def __init__(self, pretrained, tokenizer, backend, batch_size):
                self.given = (pretrained, tokenizer, backend, batch_size)

        class TaskManager:
            def __init__(self, include_path=None):
                self.all_tasks = ["capitals", *(["ours"] if include_path else [])]

        def simple_evaluate(**given):
            called.append(given)
            return {"results": {task: {"acc,none": 0.5, "alias": task} for task in given["tasks"]}}

        modules = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.models": {}}
        modules |= {"lm_eval.models.huggingface": {"HFLM": HFLM}, "lm_eval.tasks": {"TaskManager": TaskManager}}
        for name, members in modules.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        return called

    def test_it_gets_the_model_that_was_loaded(self, script, decoder, stand_in, tmp_path, capsys):
        given = [
            "--lm_eval",
            "ours",
            "--include_path",
            "tasks",
            "--few_shot",
            "3",
            "--limit",
            "7",
            "--batch_size",
            "2",
        ]
        assert script.main(["--model", decoder[2], *given, "--output_dir", str(tmp_path)]) == 0
        assert "ours acc,none" in capsys.readouterr().out
        assert figures(tmp_path)["ours"] == {"acc,none": 0.5}
        (call,) = stand_in
        assert (call["tasks"], call["num_fewshot"], call["limit"]) == (["ours"], 3, 7)
        model, _, backend, size = call["model"].given
        assert type(model).__name__ == "VariformDecoderForCausalLM" and (backend, size) == ("causal", 2)

    def test_a_task_it_does_not_know_is_refused(self, decoder, stand_in):
        with pytest.raises(ValueError, match="knows no task 'ours'; `include_path` names a folder"):
            judge_by_harness(*decoder[:2], ["ours"])

    def test_without_it_the_command_is_named(self, decoder, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ImportError, match=r"pip install 'lm_eval\[hf\]'"):
            judge_by_harness(*decoder[:2], ["ours"])

    @pytest.mark.slow
    def test_the_real_one_scores_a_local_task_as_a_plain_forward_does(self, decoder, tmp_path):
        if find_spec("lm_eval") is None:
            pytest.skip("lm_eval is not installed")
        model, tokenizer, folder = decoder
        rows = [{"question": f"{WORDS[n]} film", "choices": ["good", "bad"], "answer": n % 2} for n in range(6)]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        task = {"task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": path}}}
        task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}} is"}
        task |= {"doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "ours.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
        # As a script, beside which a file evaluate.py lies: the harness imports the library of that name
        given = ["--lm_eval", "ours", "--include_path", str(tmp_path / "tasks"), "--model", folder]
        command = [
            sys.executable,
            str(ROOT / "finetune" / "evaluate.py"),
            *given,
            "--output_dir",
            str(tmp_path / "out"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        right = 0
        for row in rows:
            likelihoods = []
            for choice in row["choices"]:
                context = tokenizer(f"{row['question']} is")["input_ids"]
                ids = torch.tensor([tokenizer(f"{row['question']} is {choice}")["input_ids"]])
                with torch.no_grad():
                    logits = model(ids).logits[0, len(context) - 1 : -1]
                likelihoods.append(-F.cross_entropy(logits, ids[0, len(context) :], reduction="sum").item())
            right += likelihoods.index(max(likelihoods)) == row["answer"]
        assert figures(tmp_path / "out")["ours"]["acc,none"] == pytest.approx(right / len(rows))


def test_a_script_named_evaluate_hides_no_library(monkeypatch):
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "finetune"))  # as Python has it for a script there
    everywhere = list(sys.path)
    assert find_spec("evaluate").origin == str(ROOT / "finetune" / "evaluate.py")
    library = import_evaluate()
    assert library.Metric.__module__ == "evaluate.module" and sys.modules["evaluate"] is library
    assert sys.path == everywhere and import_evaluate() is library


@pytest.mark.slow
def test_scripts_find_the_library_and_not_the_script(decoder, reviews, tokenizers, tmp_path):
    texts = ["--train_files", reviews[0], "--eval_files", reviews[1], "--output_dir"]
    new = ["--form", form("encoder"), "--tokenizer", tokenizers["both"], "--max_steps", "1", "--max_length", "32"]
    commands = {
        "classify": [*new, *texts, str(tmp_path / "classes")],
        "seq2seq": ["--help"],
        "evaluate": ["--model", decoder[2], *texts, str(tmp_path / "judged")],
    }
    for name, arguments in commands.items():
        command = [sys.executable, str(ROOT / "finetune" / f"{name}.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, (name, done.stderr)
    assert figures(tmp_path / "judged")["bits_per_byte"] > 0 and figures(tmp_path / "classes")["accuracy"] >= 0
