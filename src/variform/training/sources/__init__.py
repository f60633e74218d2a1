"""The data sets that packages carry, by the name a recipe gives them as `dataset`."""

from . import movie_reviews
from .base import Source, data_folder

SOURCES: dict[str, Source] = {
    "movie_reviews": movie_reviews.SOURCE,
}

__all__ = ["SOURCES", "Source", "data_folder"]
