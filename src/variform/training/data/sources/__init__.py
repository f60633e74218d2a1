"""The data sets that packages carry, by the name a recipe gives them as `dataset`."""

from . import (
    brown,
    cloze_questions,
    cmudict,
    inflections,
    movie_reviews,
    package_descriptions,
    preferences,
    shakespeare,
)
from .base import Source, data_folder

SOURCES: dict[str, Source] = {
    "brown": brown.SOURCE,
    "cloze_questions": cloze_questions.SOURCE,
    "cmudict": cmudict.SOURCE,
    "inflections": inflections.SOURCE,
    "movie_reviews": movie_reviews.SOURCE,
    "package_descriptions": package_descriptions.SOURCE,
    "preferences": preferences.SOURCE,
    "shakespeare": shakespeare.SOURCE,
}

__all__ = ["SOURCES", "Source", "data_folder"]
