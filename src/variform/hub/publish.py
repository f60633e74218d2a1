"""From the folder of a run to a repo on the Hub: assembled beside it, proved in another process, then uploaded."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..conversion.check import COMPARED, TEXTS, make_inputs
from ..conversion.checkpoint import Checkpoint, refuse_existing, whole_folder
from ..conversion.convert import auto_class_of_ours, convert_folder, family_of, quiet, saved_architecture
from ..model.configuration_variform import AUTO_MAP
from ..training.reload import outputs_of, prove_outputs, tokens_of
from .assemble import (
    ABOUT_THE_RUN,
    ADAPTER_CONFIG,
    copy_files,
    copy_run,
    files_of,
    find_files,
    find_run,
    is_adapter,
    scan,
)
from .cards import CARD_FILE, FACTS_FILE, CardFacts, form_facts, is_edited, make_card
from .pictures import draw_pictures
from .upload import check_access, check_repo_id, upload

LONGEST_PROOF, ROOM_TO_GENERATE = 32, 8  # tokens
TASK_TYPES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class Subject(NamedTuple):
    """What is published: the folder of a run, the Auto class that loads it and, of an adapter alone, what it adapts."""

    run: Path
    auto_class: str
    config: PreTrainedConfig  # of the whole model
    base: str | None = None


def publish(
    run: str | Path,
    repo_id: str | None,
    *,
    folder: str | Path | None = None,
    dry_run: bool = False,
    native: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    confirm: Callable[[str], bool] = lambda question: False,
    console: Console,
) -> str | None:
    """Assembles the repo of a trained model, proves that it loads elsewhere and computes the same, and uploads it.

    Nothing in the run's folder is changed. What was cut off can be run again: files that have arrived are not sent twice.

    Args:
        run: the output folder of a run, or any folder of a saved model or adapter.
        repo_id: where to, such as "me/my-model"; may be None in a dry run.
        folder: keep what is uploaded there; it must not exist yet. Default: nowhere.
        dry_run: stop before anything is uploaded.
        native: publish as a model of this native family, such as "llama", which needs none of our code.
        private: whether others may not see a new repo.
        revision: the branch, made if it does not exist. Default: main.
        base_model: of an adapter that was trained on a folder, the repo that others will find that model in.
        confirm: asked before anything is uploaded.
        console: where the course of things is printed.

    Returns:
        The address of the repo; None if nothing was uploaded.

    Raises:
        ValueError: for a run that cannot be published, naming what is in the way.
        FileNotFoundError, FileExistsError: for a run without a model, and a `folder` that holds anything.
        RuntimeError: if the assembled model does not load in another process, or computes something else there.
        ConnectionError: if the Hub cannot be reached or refuses; in one sentence.
    """
    subject = read_subject(find_run(run))
    check_repo_id(repo_id, dry_run)
    if not dry_run:
        check_access()
    with assembled_folder(folder) as target:
        left = assemble(subject, target, native=native, base_model=base_model)
        scan(target)
        console.print(prove(subject, target, native))
        console.print(write_final_card(subject, target, repo_id=repo_id, native=native, base_model=base_model))
        scan(target)
        list_files(target, left, console)
        if not dry_run:
            assert repo_id is not None  # by check_repo_id
            url = upload(target, repo_id, private=private, revision=revision, confirm=confirm)
            console.print(f"Published: {url}")
            return url
    where = f" The repo as it would be is in {folder}." if folder is not None else ""
    console.print(f"Dry run: nothing was uploaded.{where}")
    return None


@contextmanager
def assembled_folder(folder: str | Path | None) -> Iterator[Path]:
    """A folder to assemble the repo in: one that is kept if all goes well, or a temporary one."""
    if folder is not None:
        refuse_existing(Path(folder))
        with whole_folder(Path(folder)) as target:
            yield target
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def read_subject(run: Path) -> Subject:
    """What a run's folder holds.

    Raises:
        ValueError: for an adapter whose task, or a model whose class, is not one of those that load by an Auto class.
    """
    if not is_adapter(run):
        config = AutoConfig.from_pretrained(run)
        return Subject(run, auto_class_of(config), config)
    adapter = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{run / ADAPTER_CONFIG} does not say what it adapts: set `base_model_name_or_path`.")
    config = AutoConfig.from_pretrained(base)
    task_type = adapter.get("task_type")
    return Subject(run, TASK_TYPES[task_type] if task_type in TASK_TYPES else auto_class_of(config), config, base)


def auto_class_of(config: PreTrainedConfig) -> str:
    """The Auto class that loads a saved model, ours or native."""
    architecture = saved_architecture(config)
    if config.model_type in AUTO_MAP:
        return auto_class_of_ours(architecture, config)
    return family_of(config).auto_class_of(architecture)


def assemble(subject: Subject, target: Path, *, native: str | None, base_model: str | None) -> list[str]:
    """Fills an empty folder with everything but the card.

    Returns:
        What stays behind in the run's folder.

    Raises:
        ValueError: for an adapter that is to be native, or that adapts a folder of this machine.
    """
    run, base = subject.run, subject.base
    if native is not None:
        if base is not None:
            raise ValueError(f"{run} holds an adapter alone, which has no native form: merge it into its model first.")
        with quiet():
            convert_folder(run, target, to=native)
        copy_files(run, target, find_files(run, ABOUT_THE_RUN))
        return []
    if base is None:
        index = find_files(run, [SAFE_WEIGHTS_INDEX_NAME])
        return copy_run(run, target, {path.name for path in Checkpoint(run).files} | index)
    left = copy_run(run, target, set())
    if base_model is None and Path(base).is_dir():
        raise ValueError(
            f"{run} adapts a model in a folder of this machine: publish that one first and name its repo with "
            "`--base-model`, or merge the adapter."
        )
    path = target / ADAPTER_CONFIG
    adapter = json.loads(path.read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = base_model or base
    path.write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
    return left


def prove(subject: Subject, target: Path, native: str | None) -> str:
    """Compares what the run's model and the assembled one compute, the second in a process without Variform; in words.

    Raises:
        RuntimeError: if they differ, or the second does not load.
    """
    model = load_model(subject)
    inputs, is_text = make_inputs(subject.run, model)
    inputs = without_padding(inputs, model.config)
    expected = outputs_of(model, inputs)
    if native is not None:  # whose classes return less besides
        expected = {name: tensor for name, tensor in expected.items() if name in (*COMPARED, "generated")}
    texts = TEXTS if is_text else []
    if is_text:
        expected["tokens"] = tokens_of(AutoTokenizer.from_pretrained(subject.run), texts)
    del model
    difference = prove_outputs(
        target,
        expected,
        inputs,
        auto_class=subject.auto_class,
        remote_code=native is None and subject.config.model_type in AUTO_MAP,
        base=subject.base,
        texts=texts,
    )
    names = ", ".join(expected)
    return f"Loaded in a new process without Variform, the same {names} (largest difference {difference:.1e})."


def load_model(subject: Subject) -> Any:
    """The run's own model, in float32: a `PreTrainedModel`, or PEFT's around one."""
    auto_class = getattr(transformers, subject.auto_class)
    with quiet():
        model = auto_class.from_pretrained(subject.base or subject.run, dtype=torch.float32)
    if subject.base is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, subject.run)


def without_padding(inputs: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A batch cut to real tokens only, as native models and ours fill padding differently, with room to generate."""
    config = config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", LONGEST_PROOF) - ROOM_TO_GENERATE
    shortest = int(inputs["attention_mask"].sum(-1).min())
    length = max(1, min(shortest, longest, LONGEST_PROOF))
    return {name: tensor[..., :length].contiguous() for name, tensor in inputs.items()}


def write_final_card(
    subject: Subject, target: Path, *, repo_id: str | None, native: str | None, base_model: str | None
) -> str:
    """Writes the card of the published model, and says where it is from; one that was edited by hand is kept."""
    run = subject.run
    facts = CardFacts.load(run) if (run / FACTS_FILE).is_file() else bare_facts(subject, repo_id)
    if is_edited(run):
        copy_files(run, target, {CARD_FILE})
        return f"Card: {CARD_FILE} of the run as it was edited."
    facts.auto_class = subject.auto_class
    if subject.base is None:
        draw_pictures(target, run)
    if native is not None:
        facts.not_preserved = [*facts.not_preserved, f"Converted from Variform to a native `{native}` model, exactly."]
    usage: dict[str, Any] = {"folder": repo_id or "."}
    if subject.base is not None:
        facts.base_model = base_model or subject.base
        facts.metadata = {**facts.metadata, "library_name": "peft"}
        usage["remote_code"] = subject.config.model_type in AUTO_MAP
    make_card(facts, target, usage).save(target / CARD_FILE)
    missing = "" if "license" in facts.metadata else " It names no licence: add one to `metadata` in card.json."
    return f"Card: written from {FACTS_FILE if (run / FACTS_FILE).is_file() else 'the config'}.{missing}"


def bare_facts(subject: Subject, repo_id: str | None) -> CardFacts:
    """What is known of a model whose run wrote no facts."""
    name = repo_id.split("/")[-1] if repo_id else subject.run.resolve().name
    shape = subject.config.model_type.removeprefix("variform_").replace("_", "-")
    return CardFacts(name=name, summary=f"A Transformer {shape} of the Variform family.", **form_facts(subject.config))


def list_files(folder: Path, left: list[str], console: Console) -> None:
    """Prints what will be uploaded, with sizes, and what stays behind."""
    sizes = files_of(folder)
    for name, size in sizes.items():
        console.print(f"  {size:>14,}  {name}", markup=False)
    console.print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
    if left:
        console.print(f"Left behind: {', '.join(left)}.", markup=False)
