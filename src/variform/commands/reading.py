"""What several commands read in the same way from their arguments."""

import json
from pathlib import Path
from typing import Any


def refuse_adapter(folder: str | Path) -> None:
    """Raises ValueError for the folder of an adapter, which is no model without its base."""
    file = Path(folder, "adapter_config.json")
    if file.is_file() and not Path(folder, "config.json").is_file():
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds an adapter of {base or 'a model that it does not name'}: name that model, or merge the two with "
            "finetune/merge_lora.py."
        )


def read_form(name: str) -> Any:
    """The config of a name, a file, a folder or a repo on the Hub; that of a native checkpoint as it would be converted.

    Raises:
        FileNotFoundError: if there is no such form, with the nearest name.
        ValueError: if the form is refused, with the nearest one that is valid, as a patch.
    """
    from huggingface_hub.errors import StrictDataclassError

    from ..nearest import with_mend

    try:
        return read_config(name)
    except (ValueError, StrictDataclassError) as error:
        fields = read_fields(name)
        if fields is None:
            raise
        raise ValueError(with_mend(fields, str(error))) from error


def read_config(name: str) -> Any:
    """As `read_form`, without the mend of a form that is refused."""
    from transformers import AutoConfig, PreTrainedConfig

    from ..forms import SHAPES, list_forms, load_config

    refuse_adapter(name)
    if name in list_forms() or Path(name).is_file():
        return load_config(name)
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        return load_config(name)  # raises, with the nearest name
    saved = Path(name, "config.json")
    try:
        if saved.is_file():
            values, _ = PreTrainedConfig.get_config_dict(saved)
            if values.get("model_type") in list(SHAPES):
                config_class: Any = SHAPES[values["model_type"]][0]
                return config_class.from_dict(values)
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is neither a folder with a config.json nor a repo to be had: {reason}"
        ) from None
    return config if config.model_type in SHAPES else read_native(config)


def read_native(config: Any) -> Any:
    """The form that another family's config is converted to."""
    from ..conversion.convert import family_of, saved_architecture

    family = family_of(config)
    return family.read_form(config, family.auto_class_of(saved_architecture(config)))


def read_model(folder: Path) -> Any:
    """The model of a folder, under the head that it was saved with; converted where it is a native one."""
    from ..conversion.convert import from_hf, quiet
    from ..model.configuration_variform import AUTO_MAP
    from ..reshaping import load

    refuse_adapter(folder)
    with quiet():
        model = load(folder, None, for_measuring=True)
        return model if model.config.model_type in AUTO_MAP else from_hf(folder)


def read_fields(name: str) -> dict[str, Any] | None:
    """The fields of a form as its file has them, valid or not; None where there is no file of a form of ours to be read."""
    from ..forms import load_fields

    try:
        fields = load_fields(Path(name, "config.json") if Path(name).is_dir() else name)
    except (FileNotFoundError, ValueError):
        return None
    return fields if "variform" in str(fields.get("model_type")) else None


def read_numbers(name: str, words: str | None) -> list[int]:
    """The numbers of an option that takes several; none where it is not given."""
    if words is None:
        return []
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"`{name} {words}` must be whole numbers with commas between them, such as 5,12.") from None
