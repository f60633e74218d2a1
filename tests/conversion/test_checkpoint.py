"""Folders of weights: what is read, what is refused, and that nothing half done is left."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from variform.conversion import checkpoint, convert
from variform.conversion.checkpoint import Checkpoint
from variform.conversion.convert import convert_folder, from_hf, to_hf

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=4, num_key_value_heads=1, max_position_embeddings=24)).eval()


def bert(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(BertConfig(**SIZES, max_position_embeddings=24)).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found = Checkpoint(folder)
    return {name: found[name] for name in found.specs}


def assert_same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of the one file of a folder, in place."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def write_index(folder: Path, files: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def save_bin(state: dict[str, torch.Tensor], folder: Path, *, shards: int = 1, legacy: bool = False) -> None:
    """Saves a state dict as older releases do: pickled, whole or in shards."""
    names = list(state)
    files = [f"pytorch_model-{n}.bin" for n in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    for n, file in enumerate(files):
        part = {name: state[name] for name in names[n::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        write_index(folder, {name: files[n % shards] for n, name in enumerate(names)}, "pytorch_model.bin.index.json")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny native Llama, in one file."""
    llama().save_pretrained(tmp_path / "native")
    return tmp_path / "native"


# What is read


@pytest.mark.parametrize("form", ["safetensors", "safetensors in shards", "zip", "legacy", "zip in shards"])
def test_every_format_holds_the_same_tensors(form, tmp_path):
    model = llama()
    state = model.state_dict()
    if "safetensors" in form:
        model.save_pretrained(tmp_path, max_shard_size="2KB" if "shards" in form else "1GB")
    else:
        save_bin(state, tmp_path, shards=3 if "shards" in form else 1, legacy=form == "legacy")
    read = Checkpoint(tmp_path)
    assert (len(read.files) > 1) == ("shards" in form)
    assert_same({name: read[name] for name in read.specs}, state)
    for name, spec in read.specs.items():
        assert spec.is_meta and spec.shape == state[name].shape and spec.dtype == state[name].dtype, name


@pytest.mark.parametrize("form", ["zip", "legacy", "zip in shards"])
def test_a_model_comes_from_pickled_tensors(form, tmp_path):
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    save_bin(model.state_dict(), tmp_path, shards=3 if "shards" in form else 1, legacy=form == "legacy")
    assert_same(to_hf(from_hf(tmp_path)).state_dict(), model.state_dict())


def test_safetensors_are_preferred_to_a_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_same(tensors(folder), llama().state_dict())


def test_the_cache_of_the_hub_is_read(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert_same(to_hf(from_hf(snapshot)).state_dict(), llama().state_dict())
    convert_folder(snapshot, tmp_path / "ours")
    assert not any(path.is_symlink() for path in (tmp_path / "ours").iterdir())


def test_a_folder_reached_by_a_link_is_read(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert_same(tensors(tmp_path / "link"), llama().state_dict())


def test_the_oldest_names_of_norms_are_read(tmp_path):
    model = bert(BertForMaskedLM)
    model.save_pretrained(tmp_path)

    def age(state):
        for name in list(state):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[old] = state.pop(name)

    rewrite(tmp_path, age)
    assert any("gamma" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_same(to_hf(from_hf(tmp_path)).state_dict(), model.state_dict())


def test_a_base_checkpoint_is_found_under_the_prefix_of_a_head(tmp_path):
    """BERT's encoder alone, under `bert.` as the headed classes write it."""
    model = bert(BertModel)
    model.save_pretrained(tmp_path)

    def prefix(state):
        for name in list(state):
            state[f"bert.{name}"] = state.pop(name)

    rewrite(tmp_path, prefix)
    assert_same(to_hf(from_hf(tmp_path)).state_dict(), model.state_dict())


def test_a_headed_checkpoint_is_found_without_its_prefix(folder):
    """Llama's language model as some trainers write it, without `model.` before the stack's names."""

    def strip(state):
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)

    rewrite(folder, strip)
    assert_same(to_hf(from_hf(folder)).state_dict(), llama().state_dict())


def test_the_base_of_a_headed_checkpoint_is_read_alone(tmp_path):
    model = bert(BertForSequenceClassification)
    model.save_pretrained(tmp_path)
    assert_same(to_hf(from_hf(tmp_path, auto_class="AutoModel")).state_dict(), model.bert.state_dict())


# What is said


def test_what_has_no_place_is_named_in_a_warning(tmp_path, caplog):
    """The checkpoint that BERT was published as holds two heads; one of them is asked for."""
    model = bert(BertForPreTraining)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = from_hf(tmp_path, auto_class=AutoModelForMaskedLM)
    left = convert_folder(tmp_path, tmp_path / "ours", auto_class=AutoModelForMaskedLM).unused
    assert set(left) == {
        f"{name}.{part}" for name in ("bert.pooler.dense", "cls.seq_relationship") for part in ("weight", "bias")
    }
    for name in left:
        assert repr(name) in caplog.text
    state, native = to_hf(ours).state_dict(), model.state_dict()
    assert_same(state, {name: native[name] for name in native if name not in left})


def test_missing_tensor_is_refused_by_name(folder):
    rewrite(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight' of LlamaForCausalLM"):
        from_hf(folder)


def test_tensor_of_another_shape_is_refused_by_name(folder):
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.ones(13)}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' \(13,\).*\(12,\)"):
        from_hf(folder)


def test_a_head_that_the_checkpoint_lacks_is_refused(tmp_path):
    bert(BertModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*'cls\.predictions.*BertForMaskedLM"):
        from_hf(tmp_path, auto_class=AutoModelForMaskedLM)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        Checkpoint(tmp_path)


# What is refused


def is_one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and str(error).rstrip().endswith(".") and ". " not in str(error)


@pytest.mark.parametrize("how", ["above", "absolute", "linked", "below"])
def test_weights_outside_the_folder_are_refused_unread(how, folder, tmp_path, monkeypatch):
    outside = tmp_path / "x.safetensors"
    (folder / "model.safetensors").rename(outside)
    name = {"above": "../x.safetensors", "absolute": str(outside), "linked": "x.safetensors", "below": "a/x"}[how]
    if how == "linked":
        (folder / name).symlink_to(outside)
    write_index(folder, {"model.norm.weight": name})
    monkeypatch.setattr(checkpoint, "safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(ValueError, match="leads out of") as refused:
        Checkpoint(folder)
    assert repr(name) in str(refused.value) and is_one_sentence(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "LICENSE"])
def test_a_file_that_links_out_of_the_folder_is_refused(name, folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "kept")
    if name == "LICENSE":
        shutil.copyfile(tmp_path / "kept", folder / "model.safetensors")
    (folder / name).symlink_to(tmp_path / "kept")
    with pytest.raises(ValueError, match=f"'{name}' leads out of"):
        convert_folder(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(legacy, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    bad = {"model.norm.weight": torch.ones(12), "more": Attack(touched)}
    torch.save(bad, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or holds more than tensors") as refused:
        from_hf(folder)
    assert not touched.exists()
    assert is_one_sentence(refused.value)


def test_a_bare_pickle_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(touched)))
    with pytest.raises(ValueError, match="refusing to read it"):
        from_hf(folder)
    assert not touched.exists()
    # Unpickled otherwise, it does what it is made for
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert touched.exists()


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.ones(1)}}, [torch.ones(1)]])
def test_a_pickle_that_is_not_a_dict_of_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 4, 0.5])
def test_truncated_file_is_refused_by_name(file, kept, folder):
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        save_bin(llama().state_dict(), folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * kept) if kept == 0.5 else kept])
    with pytest.raises(ValueError, match=f"{folder.name}/{file}"):
        from_hf(folder)


def test_missing_shard_is_named(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="2KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": ["a"]}'])
def test_damaged_index_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index"):
        Checkpoint(tmp_path)


# What is left behind when a conversion does not end well


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_target_that_exists_is_refused_before_anything_is_read(kind, folder, tmp_path, monkeypatch):
    target = tmp_path / "ours"
    if kind == "folder":
        target.mkdir()
        (target / "mine").touch()
    else:
        target.write_text("mine", encoding="utf-8")
    monkeypatch.setattr(convert, "find_folder", lambda *_, **__: pytest.fail("the source was looked for"))
    with pytest.raises(FileExistsError, match="exists already") as refused:
        convert_folder(folder, target)
    assert str(target) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


def test_an_empty_target_is_filled(folder, tmp_path):
    (tmp_path / "ours").mkdir()
    convert_folder(folder, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()


@pytest.mark.parametrize("to", [None, "mistral"])
def test_an_exception_leaves_neither_target_nor_temporary_folder(to, folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert, "bring_along", full)
    with pytest.raises(OSError, match="No space left"):
        convert_folder(folder, tmp_path / "ours", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


KILLED = """
import os, signal, sys
from variform.conversion import checkpoint
from variform.conversion.convert import convert_folder

save, saved = checkpoint.save_file, []

def save_two(*args, **kwargs):
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(save(*args, **kwargs))

checkpoint.save_file = save_two
convert_folder(sys.argv[1], sys.argv[2])
"""


def test_a_killed_run_leaves_no_target(tmp_path):
    llama().save_pretrained(tmp_path / "native", max_shard_size="2KB")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "native"), str(tmp_path / "ours")]
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    (unfinished,) = tmp_path.glob(".ours.*")
    assert len(list(unfinished.glob("*.safetensors"))) == 2
    # The same command works afterwards
    convert_folder(tmp_path / "native", tmp_path / "ours")
    convert_folder(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), llama().state_dict())


# Memory

STATUS = Path("/proc/self/status")
GB = 1e9
# TinyLlama's sizes: 1.1 billion numbers
BILLION = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SHARDS = 8
# What conversion adds to the peak of resident memory, mapped files included, over what the imports take. The kernel's
# own high-water mark, put back to the present level first; `ru_maxrss` would start at what the parent held
MEASURED = """
import gc, sys
from pathlib import Path
import variform, transformers.models.llama.modeling_llama
from variform.conversion.convert import convert_folder

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":")))

gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
convert_folder(sys.argv[1], sys.argv[2])
print((kilobytes("VmHWM") - before) * 1024)
"""


def billion_numbers() -> dict[str, torch.Tensor]:
    """The tensors of a Llama of 2.2 GB in bfloat16, all of them views of one buffer, each from another place on."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(LlamaConfig(**BILLION)).state_dict().items()}
    largest = max(shape.numel() for shape in shapes.values())
    numbers = torch.randint(-(2**15), 2**14, (largest + len(shapes),), dtype=torch.int16).view(torch.bfloat16)
    return {name: numbers[n : n + shape.numel()].view(shape) for n, (name, shape) in enumerate(shapes.items())}


def save_shards(state: dict[str, torch.Tensor], folder: Path) -> int:
    """Saves a state dict in shards of equal size; returns the bytes of the largest file."""
    total = sum(tensor.nbytes for tensor in state.values())
    shards, size = [{} for _ in range(SHARDS)], 0
    for name, tensor in state.items():
        shards[min(size * SHARDS // total, SHARDS - 1)][name] = tensor
        size += tensor.nbytes
    for number, shard in enumerate(shards):
        save_file({name: tensor.clone() for name, tensor in shard.items()}, folder / f"{number}.safetensors")
    write_index(folder, {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard})
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells a process its peak of resident memory")
def test_converting_needs_little_more_memory_than_one_shard(tmp_path):
    state, native, ours = billion_numbers(), tmp_path / "native", tmp_path / "ours"
    try:
        LlamaConfig(**BILLION, architectures=["LlamaForCausalLM"]).save_pretrained(native)
        largest = save_shards(state, native)
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-c", MEASURED, str(native), str(ours)]
        run = subprocess.run(command, env=environment, check=True, timeout=600, stdout=subprocess.PIPE, text=True)
        assert sum(tensor.nbytes for tensor in state.values()) > 2 * GB
        # One shard's tensors, the copy of them that is written, and one tensor as it is read and as it is made
        needed = 2 * largest + 2 * max(tensor.nbytes for tensor in state.values())
        assert needed < 1 * GB
        assert int(run.stdout) < needed, f"{int(run.stdout) / GB:.2f} GB"
        converted = Checkpoint(ours)
        assert len(converted.files) in (SHARDS, SHARDS + 1)
        called_the_same = [name for name in state if name in converted.specs]
        assert len(called_the_same) > 150
        for name in called_the_same[::7]:
            # Bit by bit: some of the numbers are NaN
            assert torch.equal(converted[name].view(torch.int16), state[name].view(torch.int16)), name
    finally:
        # pytest keeps the folders of its last runs
        for folder in (native, ours):
            shutil.rmtree(folder, ignore_errors=True)
