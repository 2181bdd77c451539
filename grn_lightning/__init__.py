"""Generative Refinement Networks and coarse-to-fine token prediction, on Lightning."""

from importlib.metadata import version

__version__ = version("grn-lightning")
