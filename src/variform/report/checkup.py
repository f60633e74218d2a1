"""What can be wrong before a run begins: the environment, a checkpoint's weights and tokenizer, and two steps of training."""

import importlib.metadata
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedModel

from .costs import stacks_of

# What scripts use besides the requirements of the package itself
EXTRAS = ("accelerate", "datasets", "peft", "trl", "matplotlib")
# Less free space than this ends most runs at their first checkpoint
SCARCE_BYTES = 2 * 2**30
STEPS = 2
# Small enough that two steps change a trained model by nothing that matters here
LEARNING_RATE = 1e-5


class Finding(NamedTuple):
    """One thing that was looked at."""

    verdict: str  # "ok"; "note", which is no fault; "wrong"
    about: str
    words: str


def look_at_environment() -> Iterator[Finding]:
    """Versions, devices, threads, folders that must be writable, the Hub's settings, and space."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from look_at_versions()
    yield from look_at_devices()
    yield from look_at_folders()
    is_offline = constants.HF_HUB_OFFLINE
    words = "HF_HUB_OFFLINE is set: only what is in the cache is found" if is_offline else "online"
    yield Finding("note" if is_offline else "ok", "Hub", words)


def look_at_versions() -> Iterator[Finding]:
    """The packages that Variform requires, by its own metadata, and those that scripts use."""
    required = map(Requirement, importlib.metadata.requires("variform") or [])
    for requirement in (each for each in required if each.marker is None):
        installed = version_of(requirement.name)
        if installed is None:
            yield Finding("wrong", requirement.name, f"is not installed: `pip install '{requirement}'`")
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Finding("wrong", requirement.name, f"{installed}, needed is {requirement.specifier}")
        else:
            yield Finding("ok", requirement.name, installed)
    versions = {name: version_of(name) for name in EXTRAS}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = ", ".join(name for name, version in versions.items() if not version)
    yield Finding("ok", "for scripts", there or "none")
    if missing:
        yield Finding("note", "for scripts", f"not installed: {missing}; `pip install 'variform[train]'`")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_devices() -> Iterator[Finding]:
    devices = [f"cuda:{number} {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    yield Finding("ok", "devices", ", ".join([f"cpu with {os.cpu_count()} cores", *devices]))
    threads, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "")
    yield Finding("ok", "threads", f"{threads} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})")
    if threads > 1 and policy.upper() != "PASSIVE":
        words = "OMP_WAIT_POLICY is not PASSIVE: several processes on these cores would slow each other"
        yield Finding("note", "threads", words)


def look_at_folders() -> Iterator[Finding]:
    """HOME, the Hub's cache, the folder for temporary files and this one: writable, and with space."""
    if not os.environ.get("HOME"):
        words = "is not set, so caches may land where nobody looks: `export HOME=...`, or set HF_HOME"
        yield Finding("note", "HOME", words)
    mend = "set HF_HOME to a folder that can be written to: `export HF_HOME=/path/to/folder`"
    folders = {"HF cache": (Path(constants.HF_HUB_CACHE), mend)}
    folders["temporary files"] = (Path(tempfile.gettempdir()), "set TMPDIR to a folder that can be written to")
    folders["this folder"] = (Path.cwd(), "go to a folder that can be written to")
    for about, (folder, mend) in folders.items():
        obstacle = why_not_writable(folder)
        if obstacle is not None:
            yield Finding("wrong", about, f"{folder} cannot be written to ({obstacle}): {mend}")
            continue
        free = shutil.disk_usage(nearest_existing(folder)).free
        verdict = "ok" if free > SCARCE_BYTES else "note"
        yield Finding(verdict, about, f"{folder}, {free / 2**30:,.1f} GiB free")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the parent in which it would be made."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder, by trying; None where one can."""
    existing = nearest_existing(folder)
    try:
        # Root may write whatever the permissions say, but not to a read-only file system
        with tempfile.TemporaryDirectory(dir=existing):
            return None
    except OSError as error:
        return error.strerror or str(error)


def look_at_weights(folder: Path) -> Iterator[Finding]:
    """NaN and infinite numbers in the safetensors of a folder, tensor by tensor."""
    files, count, broken = sorted(folder.glob("*.safetensors")), 0, []
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                tensor = tensors.get_tensor(name)
                count += 1
                bad = 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor.float())).sum())
                if bad:
                    broken.append(f"{name} in {path.name} has {bad:,} numbers that are NaN or infinite")
    for words in broken:
        yield Finding("wrong", "weights", words)
    if not broken:
        words = f"{count} tensors in {len(files)} files, every number finite" if files else "no safetensors to look at"
        yield Finding("ok" if files else "note", "weights", words)


def look_at_tokenizer(folder: Path, config: Any) -> Iterator[Finding]:
    """Whether the ids that the tokenizer gives are rows of the model's tables, and the special ones the same."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        yield Finding("note", "tokenizer", f"none that loads from {folder}: {str(error).splitlines()[0]}")
        return
    for side, stack in stacks_of(config).items():
        if len(tokenizer) > stack.vocab_size:
            words = f"has {len(tokenizer):,} tokens, and the {side} `vocab_size={stack.vocab_size:,}`"
            yield Finding("wrong", "tokenizer", f"{words}: call `model.resize_token_embeddings({len(tokenizer)})`")
        else:
            yield Finding("ok", "tokenizer", f"{len(tokenizer):,} tokens in the {side}'s {stack.vocab_size:,} rows")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ours, its = getattr(config, name), getattr(tokenizer, name)
        if (
            ours is not None
            and its is not None
            and its != ours
            and its not in (ours if isinstance(ours, list) else [])
        ):
            yield Finding("note", "tokenizer", f"`{name}` is {its}, and the config says {ours}")


def try_training(model: PreTrainedModel, length: int = 16) -> Iterator[Finding]:
    """Two steps of training on random tokens, with AdamW at a tiny rate; the model is changed in memory alone."""
    name = type(model).__name__
    batch, losses = training_batch(model, length), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    was_training = model.training
    model.train()
    for _ in range(STEPS):
        output = model(**batch)
        loss = output.loss if "loss" in output else output[0].float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                yield Finding("wrong", "training", f"{name}: the gradient of {parameter_name} is not finite")
                return
        optimizer.step()
    model.train(was_training)
    is_finite = all(map(math.isfinite, losses))
    words = f"{name}: {STEPS} steps, losses " + ", ".join(f"{loss:.3f}" for loss in losses)
    yield Finding("ok" if is_finite else "wrong", "training", words)


def training_batch(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    """Two texts of random tokens with the labels that the model's head takes, on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in batch_of_head(model, length).items()}


def batch_of_head(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    name, stacks = type(model).__name__, list(stacks_of(model.config).values())
    length = min(length, *(stack.max_position_embeddings for stack in stacks))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(stack.vocab_size for stack in stacks), (2, length), generator=generator)
    if name.endswith("MultipleChoice"):
        return {"input_ids": ids[:, None].expand(-1, 2, -1).contiguous(), "labels": torch.zeros(2, dtype=torch.long)}
    batch = {"input_ids": ids}
    if name.endswith("QuestionAnswering"):
        return {**batch, "start_positions": torch.zeros(2).long(), "end_positions": torch.ones(2).long()}
    if name.endswith("ForSequenceClassification"):
        return {**batch, "labels": torch.zeros(2, dtype=torch.long)}
    if name.endswith("ForTokenClassification"):
        return {**batch, "labels": torch.zeros_like(ids)}
    if name.endswith(("ForCausalLM", "ForMaskedLM")):
        return {**batch, "labels": ids}
    if name.endswith("ForConditionalGeneration"):
        return {**batch, "labels": ids, "decoder_input_ids": ids}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch
