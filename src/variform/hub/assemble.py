"""The files of a published model: which of a run's folder belong to it, and whether they may leave this machine."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..model.configuration_variform import AUTO_MAP
from .cards import CARD_FILE, FACTS_FILE
from .paths import shorten_all
from .pictures import EXPERT_LOAD
from .pictures import FOLDER as PLOTS

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METRICS = "metrics.json"
# What travels besides weights and code, and nothing else: no checkpoints, states of an optimizer, arguments of a training,
# logs or pickles
ABOUT_THE_RUN = ["LICENSE*", "NOTICE*", METRICS, EXPERT_LOAD, f"{PLOTS}/*.png"]
PUBLISHED = [
    *ABOUT_THE_RUN,
    CONFIG_NAME,
    "generation_config.json",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.spm",
    "*.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
]
# Small files that a program wrote and people read, in which a path of this machine may stand
DESCRIBING = [CONFIG_NAME, "generation_config.json", "tokenizer_config.json", ADAPTER_CONFIG, METRICS]
CODE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)
# How a pickle of protocol 2 or newer begins, and an archive, which torch's pickles are in
PICKLES = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
MAGIC = {".png": b"\x89PNG"}
BINARY = (".png", ".safetensors", ".spm", ".model")


def find_run(run: str | Path) -> Path:
    """The folder of a finished run, or of any saved model or adapter.

    Raises:
        FileNotFoundError: if it is no folder or has no model. ValueError: if its weights are pickled.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"There is no folder {run}: name the output folder of a run.")
    if (run / ADAPTER_CONFIG).is_file() and (run / ADAPTER_WEIGHTS).is_file():
        return run
    if (run / CONFIG_NAME).is_file() and has_weights(run):
        return run
    if any(run.glob("*.bin")):
        raise ValueError(f"The weights in {run} are pickled: load the model and `save_pretrained` it as safetensors.")
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    hint = f": the run did not come to its end; resume it, or publish {checkpoints[-1]}" if checkpoints else ""
    raise FileNotFoundError(f"{run} holds no {CONFIG_NAME} with {SAFE_WEIGHTS_NAME}, and no adapter{hint}.")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, without the model that it adapts."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_weights(folder)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model, in one file or in shards."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def copy_run(run: Path, folder: Path, weights: set[str]) -> list[str]:
    """Copies what belongs to a published model into an empty folder.

    Args:
        weights: the names of the files that hold them, with their index; none for an adapter.

    Returns:
        The names in the run's folder that stay behind.

    Raises:
        FileNotFoundError: for a file of weights or of code that is missing. ValueError: for one outside the run's folder.
    """
    names = find_files(run, PUBLISHED) | weights
    if is_adapter(run):
        names -= {CONFIG_NAME, "generation_config.json"}  # of the model that it adapts
    else:
        names |= set(code_of(run))
    copy_files(run, folder, names)
    travelled = {name.partition("/")[0] for name in names} | {CARD_FILE, FACTS_FILE}
    return sorted(path.name for path in run.iterdir() if path.name not in travelled)


def find_files(run: Path, patterns: list[str]) -> set[str]:
    """The names of a folder's files that match, with the folder that they are in."""
    return {path.relative_to(run).as_posix() for pattern in patterns for path in run.glob(pattern) if path.is_file()}


def copy_files(run: Path, folder: Path, names: set[str]) -> None:
    """Copies files of a run, without the paths of this machine that stand in those that describe it.

    Raises:
        ValueError: for a file that is a link out of the run's folder.
    """
    for name in sorted(names):
        source, target = run / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if not source.resolve().is_relative_to(run.resolve()):
            raise ValueError(f"{source} leads out of {run}: copy the file into the folder.")
        shutil.copyfile(source, target)
        if name in DESCRIBING:
            shorten_paths_of(target)


def code_of(run: Path) -> list[str]:
    """The names of the files of code that a model's Auto classes need: those of its `auto_map`, and what they import.

    Raises:
        FileNotFoundError: if one is missing, or a model of ours has none.
    """
    config = json.loads((run / CONFIG_NAME).read_text(encoding="utf-8"))
    waiting = {reference.partition(".")[0] for reference in config.get("auto_map", {}).values()}
    if not waiting and config.get("model_type") in AUTO_MAP:
        raise FileNotFoundError(
            f"{run / CONFIG_NAME} has no `auto_map`: load the model and `save_pretrained` it again."
        )
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        path = run / f"{module}.py"
        if not path.is_file():
            raise FileNotFoundError(
                f"{run} lacks {path.name}, the model's code: load it and `save_pretrained` it again."
            )
        found.add(path.name)
        waiting |= set(CODE_IMPORT.findall(path.read_text(encoding="utf-8"))) - {Path(name).stem for name in found}
    return sorted(found)


def shorten_paths_of(path: Path) -> None:
    """Takes the paths of this machine out of a JSON file; one without any stays as it is, byte for byte."""
    values = json.loads(path.read_text(encoding="utf-8"))
    shortened = shorten_all(values)
    if shortened != values:
        path.write_text(json.dumps(shortened, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def files_of(folder: Path) -> dict[str, int]:
    """{name: bytes} of all files of a folder, the largest first."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0])))


def scan(folder: Path) -> None:
    """Reads every file of a folder and refuses what must not be published.

    Raises:
        ValueError: for weights that are not finite or not whole, naming file and tensors, and for a file that holds a
            pickle or is not what its name says.
    """
    for name in files_of(folder):
        path = folder / name
        if path.suffix == ".safetensors":
            scan_weights(path)
            continue
        content = path.read_bytes()
        if PICKLES.match(content):
            raise ValueError(f"{path} is a pickle or an archive, which can run code where it is opened; leave it out.")
        if not content.startswith(MAGIC.get(path.suffix, b"")):
            raise ValueError(f"{path} is not what its name says; draw or save it again.")
        if path.suffix not in BINARY:
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not text ({error.reason} at byte {error.start}); leave it out."
                ) from error


def scan_weights(path: Path) -> None:
    """Reads a safetensors file tensor by tensor.

    Raises:
        ValueError: if it is not whole, or a tensor holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            bad = [name for name in file.keys() if not is_finite(file.get_tensor(name))]  # noqa: SIM118  (no mapping)
    except Exception as error:  # safetensors' own error type does not say which file
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the model again.") from error
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise ValueError(f"{path}: NaN or infinity in {shown}; train from an earlier checkpoint.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite; eight-bit floats are looked at as wider ones, which torch can test."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())
