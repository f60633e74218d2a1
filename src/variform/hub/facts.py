"""What can be known about a model without asking anybody: its form, where it came from, the machine."""

import os
import platform
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedConfig

from ..model.configuration_variform import AUTO_MAP, VERSION
from ..model.expert_fields import ExpertFields
from ..report.compare import NOT_FORM
from ..report.costs import count_costs, stacks_of
from ..report.form import as_text, describe, pattern_period


def form_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config of the family tells, as arguments of `CardFacts`; of a native config nothing.

    Returns:
        `parameters`, `active_parameters`, `form`, `form_in_words` and `not_preserved`.
    """
    if config.model_type not in AUTO_MAP:
        return {}
    costs = count_costs(config)
    return {
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        "form": form_as_yaml(config),
        "form_in_words": as_text(describe(config)).rstrip(),
        "not_preserved": origin_in_words(config),
    }


def form_as_yaml(config: PreTrainedConfig) -> str:
    """The form as a YAML file that `variform.load_config` reads: every field that is not as by default."""
    form: dict[str, Any] = {"model_type": config.model_type}
    if config.is_encoder_decoder:
        form |= changed_fields(config)
    for side, stack in stacks_of(config).items():
        values = changed_fields(stack)
        if "attention_patterns" in values:
            values["attention_patterns"] = pattern_period(stack)
        form |= {side: values} if config.is_encoder_decoder else values
    return yaml.safe_dump(form, sort_keys=False).strip()


def changed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a form, of one stack or of what two share, that differ from their defaults."""
    is_dense = getattr(config, "num_experts", None) == 0
    idle = {f.name for f in fields(ExpertFields)} if is_dense else set()  # they follow from fields that play a part
    changed = {}
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in idle | NOT_FORM and value != default and not isinstance(value, PreTrainedConfig):
            changed[f.name] = value
    return changed


def origin_in_words(config: PreTrainedConfig) -> list[str]:
    """Of a converted model, what its native config said and the form does not."""
    origin = dict(config.origin or {})
    native = origin.pop("model_type", None)
    if native is None:
        return []
    lines = [f"The form came from a native `{native}` model by conversion, which is exact."]
    if origin:
        names = ", ".join(f"`{name}`" for name in sorted(origin))
        lines.append(
            f"No field of the form says what these of its fields do: {names}. `variform.to_hf` gives them back."
        )
    return lines


def environment() -> dict[str, str]:
    """The machine and the versions a model was trained with, for `CardFacts.training`; the commit, where there is one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    commit = git_revision()
    return {
        "hardware": f"{device}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Variform {VERSION}",
        **({"code": commit} if commit else {}),
    }


def git_revision(file: str | Path = __file__) -> str:
    """The commit of the checkout that a file of the code is part of; empty where it is installed, or there is no git."""
    folder = Path(file).resolve().parent
    try:
        # A package that was installed into somebody's checkout lies in it, and is no part of it
        ask_git(folder, "ls-files", "--error-unmatch", Path(file).name)
        commit, changes = ask_git(folder, "rev-parse", "HEAD"), ask_git(folder, "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"git commit {commit}" + ", with changes that are not committed" * bool(changes)


def ask_git(folder: Path, *arguments: str) -> str:
    """What a git command says in a folder."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
