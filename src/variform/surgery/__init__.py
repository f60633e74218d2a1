"""Changing the form of a trained model. Each operation says what it preserves."""

from .experts import change_experts_layout
from .rebuilding import Statement
from .sparsify import sparsify
from .upcycle import upcycle

__all__ = ["Statement", "change_experts_layout", "sparsify", "upcycle"]
