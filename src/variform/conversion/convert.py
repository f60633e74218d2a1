"""`from_hf`, `to_hf` and the same on disk."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from rich.progress import track
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..model.checks import one_of
from ..model.configuration_variform import AUTO_MAP
from . import FAMILIES, engine
from .checkpoint import Checkpoint, ShardWriter, inside, refuse_existing, whole_folder
from .family import Family

logger = logging.get_logger(__name__)

# What is downloaded of a repo on the Hub: weights, configs, tokenizers; no code
DOWNLOADED = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.spm", "LICENSE*", "NOTICE*"]
DOWNLOADED_WITHOUT_PICKLES = [pattern for pattern in DOWNLOADED if pattern != "*.bin"]
VOCABULARIES = ["vocab*", "merges.txt", "*.model", "*.spm", "tokenizer.json"]
# Files that come along as they are
COPIED = ["preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*", *VOCABULARIES]
# Families that one may look for, and what no field of ours says of them
BEYOND = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "its attention compresses keys and values (MLA)"),
}


def from_hf(
    model_or_path: PreTrainedModel | str | Path,
    *,
    auto_class: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The Variform model that computes what a transformers model does, with its weights, head included.

    Args:
        model_or_path: a model, a folder, or a repo on the Hub.
        auto_class: which head, such as `AutoModelForMaskedLM`; default: that of the model or of the saved config.
        revision, token, cache_dir, local_files_only: for the Hub, as in `from_pretrained`.
        gguf_file: a file in the folder or repo to read through transformers' GGUF reader.
        kwargs: for the `from_pretrained` of the Variform class, such as `dtype` and `attn_implementation`.

    Returns:
        A model in evaluation mode, in the dtype of the original, whose tensors are copies.

    Raises:
        ValueError: for a family, a head or a feature that Variform does not have, and for a checkpoint that lacks
            tensors or holds ones of another shape; nothing is filled in.
        FileNotFoundError: if there is no such folder or repo, or it has no weights.
    """
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub["local_files_only"] = local_files_only
    if gguf_file is not None:
        model_or_path = load_gguf(str(model_or_path), gguf_file, auto_class, hub)
    if isinstance(model_or_path, torch.nn.Module):
        source = refuse_wrapped(model_or_path)
        config, generation = source.config, getattr(source, "generation_config", None)
        architecture, stored = type(source).__name__, source.state_dict()
        read: engine.Read = stored.__getitem__
    else:
        folder = find_folder(model_or_path, **hub)
        config, generation = AutoConfig.from_pretrained(folder), read_generation_config(folder)
        refuse_quantized(config)
        checkpoint = Checkpoint(folder)
        architecture = saved_architecture(config)
        stored, read = checkpoint.specs, checkpoint.__getitem__
    family = family_of(config)
    conversion = engine.inwards(family, config, family.auto_class_of(architecture, auto_class), stored, read)
    report_unused(conversion)
    report_form(conversion.config)
    model = build(conversion, read, kwargs)
    if generation is not None and model.can_generate():
        model.generation_config = generation
    return model


def load_gguf(source: str, gguf_file: str, auto_class: Any, hub: dict[str, Any]) -> PreTrainedModel:
    """The native model of a GGUF file, which transformers' reader builds itself, here with its weights unpacked."""
    name = getattr(auto_class, "__name__", auto_class) or "AutoModelForCausalLM"
    unpacked = GgufConfig(dequantize=True)
    return getattr(transformers, name).from_pretrained(
        source, gguf_file=gguf_file, quantization_config=unpacked, **hub
    )


def to_hf(model: PreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    """The native transformers model that computes what a Variform model does, with copies of its weights.

    Args:
        model: a Variform model.
        model_type: the family, such as "llama"; default: where the weights came from, else the first one that can
            express the form.

    Returns:
        A model in evaluation mode that needs none of our code.

    Raises:
        ValueError: if the family cannot express the form, naming the field; if none can, what stands in the way of each.
    """
    refuse_wrapped(model)
    auto_class = auto_class_of_ours(type(model).__name__, model.config)
    family = choose_family(model.config, auto_class, model_type)
    stored = model.state_dict()
    conversion = engine.outwards(family, model.config, auto_class, stored, stored.__getitem__)
    native = build(conversion, stored.__getitem__, {})
    if native.can_generate() and model.can_generate():
        native.generation_config = model.generation_config
    return native


class Converted(NamedTuple):
    """What `convert_folder` did: the class and config of the result, the stored tensors that it has no place for, its
    number of files of weights."""

    architecture: str
    config: PreTrainedConfig
    unused: list[str]
    shards: int


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    auto_class: Any = None,
    show_progress: bool = False,
    **hub: Any,
) -> Converted:
    """Converts a checkpoint on disk, shard by shard, with its tokenizer, generation config and processor.

    Holds one shard in memory, of the size of the largest one of the source, and a copy while it writes it. Writes a
    temporary folder and renames it.

    Args:
        source: a folder or a repo on the Hub, of a native model or of ours.
        target: a folder that does not exist yet.
        to: the native family to convert to; default: to ours, or from ours to where the weights came from.
        auto_class: which head of a native source; default: as its config says.
        show_progress: draw a bar while the tensors are written.
        hub: `revision token cache_dir local_files_only`.

    Raises:
        FileExistsError: if the target holds anything. Otherwise as in `from_hf` and `to_hf`.
    """
    target = Path(target)
    refuse_existing(target)
    source = find_folder(source, **hub)
    config = AutoConfig.from_pretrained(source)
    if to is not None and config.model_type not in AUTO_MAP:
        return convert_between(source, target, to=to, auto_class=auto_class, show_progress=show_progress)
    checkpoint = Checkpoint(source)
    conversion = plan_folder(checkpoint, config, to, auto_class)
    report_unused(conversion)
    with whole_folder(target) as temporary:
        writer = ShardWriter(temporary, conversion.specs, checkpoint.largest_file)
        made, count = conversion.run(checkpoint.__getitem__), len(conversion.recipes)
        for name, tensor in track(made, "Converting", count, transient=True, disable=not show_progress):
            writer.add(name, tensor)
        writer.close()
        save_config(conversion, temporary)
        bring_along(source, temporary, config)
    return Converted(conversion.model_class.__name__, conversion.config, conversion.unused, writer.last + 1)


def plan_folder(
    checkpoint: Checkpoint, config: PreTrainedConfig, to: str | None, auto_class: Any
) -> engine.Conversion:
    """How a checkpoint becomes one of the other side."""
    refuse_quantized(config)
    architecture = saved_architecture(config)
    if config.model_type in AUTO_MAP:
        name = auto_class_of_ours(architecture, config)
        family = choose_family(config, name, to)
        conversion = engine.outwards(family, config, name, checkpoint.specs, checkpoint.__getitem__)
        return engine.as_stored(conversion, family, name)
    family = family_of(config)
    name = family.auto_class_of(architecture, auto_class)
    return engine.inwards(family, config, name, checkpoint.specs, checkpoint.__getitem__)


def convert_between(source: Path, target: Path, *, to: str, **options: Any) -> Converted:
    """From one native family to another: through ours, in a folder beside the target."""
    families_of_type(to)
    with whole_folder(target) as temporary:
        convert_folder(source, temporary / "variform", **options)
        converted = convert_folder(temporary / "variform", temporary / "native", to=to)
        shutil.rmtree(temporary / "variform")
        for path in (temporary / "native").iterdir():
            path.rename(temporary / path.name)
        (temporary / "native").rmdir()
    return converted


def save_config(conversion: engine.Conversion, folder: Path) -> None:
    """Writes the config, and for our classes the code that loads without this package."""
    config = conversion.config
    config.architectures = [conversion.model_class.__name__]
    dtypes = [spec.dtype for spec in conversion.specs.values() if spec.is_floating_point()]
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = max(set(dtypes), key=dtypes.count)
    if config.model_type in AUTO_MAP:
        with torch.device("meta"):
            model = conversion.model_class(config)
        custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)


def bring_along(source: Path, target: Path, config: PreTrainedConfig) -> None:
    """The generation config, the tokenizer and what else belongs to a checkpoint."""
    generation = read_generation_config(source)
    if generation is not None:
        generation.save_pretrained(target)
    for pattern in COPIED:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(inside(source, path.name), target / path.name)
    if any(path for pattern in VOCABULARIES for path in source.glob(pattern)):
        try:
            AutoTokenizer.from_pretrained(source, config=config).save_pretrained(target)
        except (ImportError, OSError, ValueError) as error:
            logger.warning(f"The tokenizer of {source} was not converted: {error}")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a folder, if it has one."""
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def build(conversion: engine.Conversion, read: engine.Read, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a conversion, in memory and in evaluation mode."""
    state = dict(conversion.run(read))
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    conversion.config.dtype = max(set(dtypes), key=dtypes.count)
    name = conversion.config.name_or_path
    with quiet():
        loaded: Any = conversion.model_class.from_pretrained(
            None,
            config=conversion.config,
            state_dict=state,
            output_loading_info=True,
            **{"dtype": conversion.config.dtype, **options},
        )
    model, info = loaded
    model.name_or_path = model.config.name_or_path = name  # PEFT would ask the Hub for a model called None
    wrong = {kind: sorted(names) for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        raise ValueError(f"{conversion.model_class.__name__} did not take every tensor: {wrong}.")
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No bar of transformers' own for loading weights."""
    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            logging.enable_progress_bar()


def find_folder(
    source: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is, or the downloaded snapshot of a repo on the Hub, without pickles if it can be."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        raise FileNotFoundError(f"There is no folder {source}.")
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=DOWNLOADED_WITHOUT_PICKLES, **options))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=DOWNLOADED, **options))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        what = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"There is no folder {source}, and no repo that can be reached: {what}") from error
    return folder


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a native config.

    Raises:
        ValueError: if it is not one of ours to convert.
    """
    if config.model_type in AUTO_MAP:
        raise ValueError(f"This is a {config.model_type} already: load it with `AutoModel...from_pretrained`.")
    return next(family for family in families_of_type(config.model_type) if family.takes(config))


def families_of_type(model_type: str) -> list[Family]:
    """The family that transformers calls so, once for each shape that it has.

    Raises:
        ValueError: if it is not one of ours, with the nearest name.
    """
    if model_type in BEYOND:
        raise ValueError(f"{model_type}: Variform does not carry this family: {BEYOND[model_type]}.")
    one_of("model_type", model_type, {family.model_type for family in FAMILIES.values()})
    return [family for family in FAMILIES.values() if family.model_type == model_type]


def choose_family(form: PreTrainedConfig, auto_class: str, model_type: str | None) -> Family:
    """The family that is asked for, that the weights came from, or the first one that can express the form."""
    model_type = model_type or (form.origin or {}).get("model_type")
    if model_type is not None:
        families = {family.shape: family for family in families_of_type(model_type)}
        if form.model_type not in families:
            raise ValueError(f"{model_type} is a {' or a '.join(families)}, and this form a {form.model_type}.")
        family = families[form.model_type]
        family.auto_class_of("", auto_class)
        return family
    obstacles = []
    for family in FAMILIES.values():
        if family.shape == form.model_type and auto_class in family.heads:
            try:
                family.write_config(form, auto_class)
                return family
            except ValueError as error:
                obstacles.append(f"- {error}")
    raise ValueError("\n".join(["No native family expresses this form:", *obstacles]))


def saved_architecture(config: PreTrainedConfig) -> str:
    """The class that a saved config names; empty where it names none."""
    return config.architectures[0] if config.architectures else ""


def auto_class_of_ours(architecture: str, config: PreTrainedConfig) -> str:
    """The Auto class of one of our classes.

    Raises:
        ValueError: if it is not one of ours.
    """
    classes = {reference.split(".")[1]: name for name, reference in AUTO_MAP.get(config.model_type, {}).items()}
    if architecture not in classes:
        raise ValueError(f"{architecture} is not a Variform model: `to_hf` takes one of those, `from_hf` the others.")
    return classes[architecture]


def refuse_wrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself; refuses one with adapters or quantised weights, whose tensors are not its own."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("The model holds LoRA adapters: call `merge_and_unload()` on the PEFT model first.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model is quantised: load it in a floating-point dtype, or give `from_hf` the folder and `gguf_file=`."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model: hand in the one that it wraps.")
    return model


def refuse_quantized(config: PreTrainedConfig) -> None:
    """Refuses a folder of quantised weights, with what brings them into a floating-point dtype."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    options = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method")))
    mend = "convert the weights that it was quantised from"
    if method == "mxfp4":
        # In the original format, transformers saves the unpacked weights under the names of the packed ones
        mend = (
            "load it with `quantization_config=Mxfp4Config(dequantize=True)`, and give `from_hf` that model, or save it with "
            "`save_original_format=False` and convert the folder"
        )
    raise ValueError(f"The checkpoint is quantised ({method}): {mend}.")


def report_form(form: PreTrainedConfig) -> None:
    """Logs the form that was found, on one screen, at the level INFO."""
    if logger.isEnabledFor(logging.INFO):
        from ..report.form import as_text, describe  # what draws it is loaded when it is asked for

        logger.info(as_text(describe(form)))


def report_unused(conversion: engine.Conversion) -> None:
    """Says which tensors are left behind."""
    if conversion.unused:
        logger.warning(
            f"{conversion.model_class.__name__} has no place for {engine.shown(conversion.unused)} of the checkpoint: "
            "left behind."
        )
