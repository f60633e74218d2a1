"""What a model learns from: sets that are registered, local or on the Hub, and how their texts become batches."""

from .arguments import DataArguments
from .splits import facts, load_data

__all__ = ["DataArguments", "facts", "load_data"]
