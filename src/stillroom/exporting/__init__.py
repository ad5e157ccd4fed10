"""Ship the student: a file for a target, verified against the student in that target's own runtime."""

from stillroom.exporting.artifact import Artifact, Exporter, Written, load_artifact
from stillroom.exporting.stage import PRECISIONS, TARGETS, export
from stillroom.exporting.verify import TOLERANCES, Tolerance

__all__ = [
    "PRECISIONS",
    "TARGETS",
    "TOLERANCES",
    "Artifact",
    "Exporter",
    "Tolerance",
    "Written",
    "export",
    "load_artifact",
]
