"""What several commands read in the same way from their arguments."""

from pathlib import Path
from typing import Any


def read_form(name: str) -> Any:
    """The config of a name, a file, a folder or a repo on the Hub; that of a native checkpoint as it would be converted.

    Raises:
        FileNotFoundError: if there is no such form, with the nearest name.
        ValueError: if the form is refused.
    """
    from transformers import AutoConfig

    from ..conversion.convert import family_of, saved_architecture
    from ..forms import list_forms, load_config
    from ..model.configuration_variform import AUTO_MAP

    if name in list_forms() or Path(name).is_file():
        return load_config(name)
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        return load_config(name)  # raises, with the nearest name
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is neither a folder with a config.json nor a repo to be had: {reason}"
        ) from None
    if config.model_type in AUTO_MAP:
        return config
    family = family_of(config)
    return family.read_form(config, family.auto_class_of(saved_architecture(config)))


def read_numbers(name: str, words: str | None) -> list[int]:
    """The numbers of an option that takes several; none where it is not given."""
    if words is None:
        return []
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"`{name} {words}` must be whole numbers with commas between them, such as 5,12.") from None
