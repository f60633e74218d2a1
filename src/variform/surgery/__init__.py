"""Changing the form of a trained model. Each operation says what it preserves."""

from .sparsify import Statement, sparsify

__all__ = ["Statement", "sparsify"]
