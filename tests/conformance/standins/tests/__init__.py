"""Joins these stand-ins and transformers' own `tests` into one package, before any other that a library left installed."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
