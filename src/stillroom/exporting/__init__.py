"""Ship the student: a file for a target, verified against the student in that target's own runtime."""

from stillroom.exporting.artifact import Artifact, Exporter, Target, Written, load_artifact
from stillroom.exporting.stage import TARGETS, export, target_of
from stillroom.exporting.verify import TOLERANCES, Tolerance

__all__ = [
    "TARGETS",
    "TOLERANCES",
    "Artifact",
    "Exporter",
    "Target",
    "Tolerance",
    "Written",
    "export",
    "load_artifact",
    "target_of",
]
