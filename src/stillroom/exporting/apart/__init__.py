"""A process in an environment apart (``stillroom.apart``) that stays open: a target whose pins clash with ours."""

from stillroom.exporting.apart.process import Apart, Runtime, environment, names

__all__ = ["Apart", "Runtime", "environment", "names"]
