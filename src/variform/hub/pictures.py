"""The pictures of a card: what they are called in a run's folder, and what they show."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..model.configuration_variform import AUTO_MAP
from ..report.costs import stacks_of
from ..report.expert_load import LOAD_FILE, draw_expert_load
from ..report.pictures import draw_views
from ..report.views import views_of

FOLDER = "plots"
PATTERNS = "attention_patterns.png"
EXPERT_LOAD = "expert_load.png"
# What the pictures that we draw show; another one is called by its file
CAPTIONS = {
    PATTERNS: "Which query sees which key, in each distinct layer",
    "curves.png": "What the training logged, step by step",
    EXPERT_LOAD: "How the tokens were shared out among the experts while the model trained",
}


class Picture(NamedTuple):
    """A picture of a card: its place, relative to the card, and what it shows."""

    path: str
    caption: str

    @property
    def is_of_form(self) -> bool:
        return Path(self.path).name == PATTERNS


def pictures_of(folder: str | Path) -> list[Picture]:
    """The pictures that are in a run's folder: those in plots/, and the heat map of the experts."""
    folder = Path(folder)
    found = [*sorted((folder / FOLDER).glob("*.png")), *folder.glob(EXPERT_LOAD)]
    return [
        Picture(path.relative_to(folder).as_posix(), CAPTIONS.get(path.name, path.stem.replace("_", " ").capitalize()))
        for path in found
    ]


def has_patterns(config: PreTrainedConfig) -> bool:
    """Whether a form of ours has a layer that does not see everything."""
    return config.model_type in AUTO_MAP and any(
        entry["name"] != "full" for stack in stacks_of(config).values() for entry in stack.attention_patterns
    )


def draw_pictures(folder: str | Path, run: str | Path | None = None) -> list[Path]:
    """Draws what a saved model's form and a training's log tell: sparse patterns, and the load of experts.

    Args:
        folder: where the pictures go.
        run: the folder of the model and of the log. Default: the same.

    Returns:
        The files written; none without matplotlib, and none of what there is nothing to show of.
    """
    folder, run = Path(folder), Path(folder if run is None else run)
    if find_spec("matplotlib") is None:
        return []
    drawn = []
    # The folder of an adapter has no config
    config = AutoConfig.from_pretrained(run) if (run / CONFIG_NAME).is_file() else None
    if config is not None and has_patterns(config):
        drawn.append(folder / FOLDER / PATTERNS)
        drawn[-1].parent.mkdir(exist_ok=True)
        draw_views(views_of(config), path=drawn[-1])
    if (run / LOAD_FILE).is_file():
        drawn.append(folder / EXPERT_LOAD)
        draw_expert_load(run, path=drawn[-1])
    return drawn
