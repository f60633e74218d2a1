"""A run is published whole, proved in another process, and without anything that does not belong to the model."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from rich.console import Console
from safetensors.torch import load_file, save_file
from stand_in import TOKEN, StandIn
from tiny import build, tiny
from transformers import AutoModelForCausalLM

from variform.commands.publish import add_publish
from variform.hub import upload
from variform.hub.assemble import find_run
from variform.hub.cards import CardFacts, DataSource, Figure, form_facts, write_card
from variform.hub.publish import publish
from variform.model.configuration_variform import AUTO_MAP
from variform.training.tokenizer import byte_tokenizer

BYTES = 257
EXPERTS = {"attention_patterns": ["sliding_window:4", "full"], "num_experts": 4, "num_experts_per_tok": 2}
PRIVATE = ["optimizer.pt", "training_args.bin", "trainer_state.json", "log.jsonl", "train_config.yaml", "notes.txt"]
QUIET = Console(quiet=True)
SHAPES = {"variform_encoder": "encoder", "variform_decoder": "decoder", "variform_encoder_decoder": "encoder_decoder"}


def make_run(folder, shape="decoder", auto_class="AutoModelForCausalLM", **fields):
    """What a finished run leaves behind: a model, a tokenizer, facts, figures, and much that is nobody's business."""
    size = {"vocab_size": BYTES, "max_position_embeddings": 64}
    sized = {"encoder": {**size, **fields}, "decoder": size} if shape == "encoder_decoder" else {**size, **fields}
    model = build(tiny(shape, **sized), getattr(transformers, auto_class))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "checkpoint-7").mkdir()
    for name in [*PRIVATE, "checkpoint-7/optimizer.pt"]:
        (folder / name).write_bytes(b"PK\x03\x04 secret")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG loss")
    (folder / "metrics.json").write_text(json.dumps({"bits_per_byte": 2.5, "file": f"{folder}/a.txt"}))
    facts = CardFacts(
        name="run",
        summary="Writes.",
        auto_class=auto_class,
        dataset="books",
        evaluated_on="books, held out",
        figures=[Figure("bits_per_byte", "bits per byte", 2.5, "bits")],
        sources=[DataSource("books", "ab" * 32, "CC0-1.0")],
        command=f"python finetune/causal_lm.py --output_dir {folder}",
        metadata={"license": "cc0-1.0"},
        **form_facts(model.config),
    )
    write_card(folder, facts)
    return model


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(upload, "get_token", lambda: TOKEN)
    disable_progress_bars()
    with StandIn() as hub:
        monkeypatch.setattr(upload, "HfApi", partial(HfApi, hub.url, token=TOKEN))
        yield hub
    enable_progress_bars()


def test_a_run_is_proved_uploaded_and_left_as_it_was(hub, tmp_path):
    make_run(tmp_path / "run", **EXPERTS)
    before = contents(tmp_path / "run")
    console = Console(record=True, width=200, file=io.StringIO())
    address = publish(
        tmp_path / "run",
        "me/x",
        folder=tmp_path / "repo",
        private=True,
        confirm=lambda question: True,
        console=console,
    )
    said = console.export_text()
    assert address == f"{hub.url}/me/x" and address in said
    assert "the same logits, generated, tokens (largest difference 0.0e+00)" in said
    assert contents(tmp_path / "run") == before

    repo = contents(tmp_path / "repo")
    uploaded = hub.repos["me/x"]["main"]
    uploaded.pop(".gitattributes")
    assert uploaded == repo and hub.private == {"me/x"}
    assert all(f"{len(content):,}  {name}" in said for name, content in repo.items())
    assert not {*PRIVATE, "card.json"} & set(repo) and not any(name.startswith("checkpoint") for name in repo)
    assert f"Left behind: {', '.join(sorted(['checkpoint-7', *PRIVATE]))}." in said
    assert repo["model.safetensors"] == before["model.safetensors"]
    assert {"tokenizer.json", "generation_config.json", "plots/loss.png", "modeling_variform.py", "moe.py"} <= set(
        repo
    )
    for name, content in repo.items():
        assert str(tmp_path).encode() not in content, name

    card = repo["README.md"].decode()
    assert 'path = "me/x"' in card and "](plots/attention_patterns.png)" in card and "--output_dir run" in card
    metadata = metadata_load(tmp_path / "repo" / "README.md")
    assert metadata["license"] == "cc0-1.0" and metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 2.5


def test_a_native_model_needs_none_of_our_code(tmp_path):
    make_run(tmp_path / "run", norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False)
    publish(tmp_path / "run", "me/x", dry_run=True, folder=tmp_path / "repo", native="llama", console=QUIET)
    repo = contents(tmp_path / "repo")
    assert json.loads(repo["config.json"])["model_type"] == "llama"
    assert not any(name.endswith(".py") for name in repo) and {"tokenizer.json", "metrics.json"} <= set(repo)
    card = repo["README.md"].decode()
    assert "trust_remote_code" not in card
    assert "- Converted from Variform to a native `llama` model, exactly." in card
    native = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "repo")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(native(ids).logits, ours(ids).logits)


def make_adapter(folder):
    """A LoRA adapter of the model in `folder / "base"`, moved off its start, in `folder / "run"`."""
    make_run(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(folder / "run")  # with a card of PEFT's own, which is a form to fill in
    byte_tokenizer().save_pretrained(folder / "run")


def test_an_adapter_alone_names_the_repo_of_its_base(tmp_path):
    make_adapter(tmp_path)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="folder of this machine: publish that one first"):
        publish(run, "me/adapter", dry_run=True, console=QUIET)
    publish(run, "me/adapter", dry_run=True, folder=tmp_path / "repo", base_model="me/base", console=QUIET)
    repo = contents(tmp_path / "repo")
    assert set(repo) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(repo["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = repo["README.md"].decode()
    assert 'from_pretrained("me/base", trust_remote_code=True)' in card and "started from me/base" in card
    assert "More Information Needed" not in card
    assert not any(str(tmp_path).encode() in content for content in repo.values())


def test_a_card_that_somebody_edited_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("variform.hub.publish.prove", lambda *arguments: "not under test")
    make_run(tmp_path / "run")
    card = tmp_path / "run" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    publish(tmp_path / "run", "me/x", dry_run=True, folder=tmp_path / "repo", console=QUIET)
    assert (tmp_path / "repo" / "README.md").read_text() == card.read_text()


# Refusals, none of which leaves anything behind


def poison(run, value):
    weights = load_file(run / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 1] = value
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def truncate(run):
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-10])


def link_out(run):
    (run / "model.safetensors").rename(run.parent / "elsewhere")
    (run / "model.safetensors").symlink_to(run.parent / "elsewhere")


SPOILT = {
    "nan": (
        lambda run: poison(run, float("nan")),
        r"model\.safetensors: NaN or infinity in model\.layers\.1\.mlp\.down",
    ),
    "infinity": (lambda run: poison(run, float("inf")), "NaN or infinity in"),
    "truncated": (truncate, r"model\.safetensors is not a whole safetensors file"),
    "a pickle by the name of a vocabulary": (
        lambda run: (run / "vocab.txt").write_bytes(b"\x80\x04\x95evil"),
        r"vocab\.txt is a pickle or an archive",
    ),
    "an archive by the name of a picture": (
        lambda run: (run / "plots" / "loss.png").write_bytes(b"PK\x03\x04"),
        r"loss\.png is a pickle or an archive",
    ),
    "no picture": (
        lambda run: (run / "plots" / "loss.png").write_bytes(b"GIF"),
        r"loss\.png is not what its name says",
    ),
    "no text": (lambda run: (run / "LICENSE").write_bytes(b"\xff\xfe\x00"), "LICENSE is not text"),
    "a link out of the run": (link_out, "leads out of"),
    "no code": (lambda run: (run / "feed_forward.py").unlink(), r"lacks feed_forward\.py, the model's code"),
    "another card": (lambda run: (run / "card.json").write_text("{}"), r"card\.json does not hold the facts"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_must_not_be_published_is_refused_by_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr("variform.hub.publish.prove", lambda *arguments: "not under test")
    spoil, words = SPOILT[name]
    make_run(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        publish(tmp_path / "run", "me/x", dry_run=True, folder=tmp_path / "repo", console=QUIET)
    assert not (tmp_path / "repo").exists() and not list(tmp_path.glob(".repo*"))


def test_a_run_that_did_not_end_is_told_its_checkpoints(tmp_path):
    for step in (7, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"did not come to its end; resume it, or publish .*checkpoint-14"):
        find_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_run(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="are pickled"):
        find_run(tmp_path)


def test_a_form_without_a_native_one_is_refused_by_field(tmp_path):
    make_run(tmp_path / "run", position_embedding_type="alibi")
    with pytest.raises(ValueError, match="position_embedding_type"):
        publish(tmp_path / "run", "me/x", dry_run=True, native="llama", console=QUIET)
    make_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds an adapter alone, which has no native form"):
        publish(tmp_path / "lora" / "run", "me/x", dry_run=True, native="llama", console=QUIET)


def test_a_folder_that_holds_anything_is_left_alone(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "run", "me/x", dry_run=True, folder=tmp_path / "repo", console=QUIET)
    assert contents(tmp_path / "repo") == {"mine.txt": b"mine"}


def test_offline_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        publish(tmp_path / "run", "me/x", folder=tmp_path / "repo", console=QUIET)
    assert contents(tmp_path / "run") == before and not (tmp_path / "repo").exists()


# The command


def parse(*words):
    parser = argparse.ArgumentParser()
    add_publish(parser.add_subparsers())
    return parser.parse_args(["publish", *words])


def test_the_command_hands_everything_on(monkeypatch):
    called = {}
    monkeypatch.setattr("variform.hub.publish.publish", lambda *args, **kwargs: called.update(args=args, **kwargs))
    options = parse("runs/x", "--repo-id", "me/x", "--private", "--native", "llama", "--revision", "v2", "--yes")
    assert options.run(options, QUIET) == 0
    assert called.pop("confirm")("?") is True and called.pop("console") is QUIET
    assert called == {
        "args": ("runs/x", "me/x"),
        "folder": None,
        "dry_run": False,
        "native": "llama",
        "private": True,
        "revision": "v2",
        "base_model": None,
    }


def test_nobody_says_yes_where_there_is_no_terminal(monkeypatch, capsys):
    def refused(*args, confirm, **kwargs):
        assert not confirm("Upload?")
        raise RuntimeError("gives another `logits`")

    monkeypatch.setattr("variform.hub.publish.publish", refused)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    options = parse("runs/x", "--dry-run")
    assert options.run(options, QUIET) == 1
    assert capsys.readouterr().err == "error: gives another `logits`\n"


# Every class, and a process that dies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "auto_class"),
    [(SHAPES[kind], name) for kind, entries in AUTO_MAP.items() for name in entries if name != "AutoConfig"],
)
def test_every_class_is_proved(shape, auto_class, tmp_path):
    make_run(tmp_path / "run", shape, auto_class)
    console = Console(record=True, width=200, file=io.StringIO())
    publish(tmp_path / "run", "me/x", dry_run=True, console=console)
    assert "the same " in console.export_text()


@pytest.mark.slow
def test_an_upload_that_was_killed_is_run_again(tmp_path):
    make_run(tmp_path / "run", **EXPERTS)
    command = [sys.executable, "-m", "variform.cli", "publish", str(tmp_path / "run"), "--repo-id", "me/x", "--yes"]
    with StandIn() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment.update(HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))
        reached, go_on = threading.Event(), threading.Event()
        hub.on_upload = lambda: (reached.set(), go_on.wait(120))
        child = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
        assert reached.wait(180)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        hub.on_upload = lambda: None
        go_on.set()
        assert list(hub.repos["me/x"]["main"]) == [".gitattributes"]
        before = contents(tmp_path / "run")
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"Published: {hub.url}/me/x" in done.stdout
        assert hub.repos["me/x"]["main"]["model.safetensors"] == before["model.safetensors"]
        assert contents(tmp_path / "run") == before
