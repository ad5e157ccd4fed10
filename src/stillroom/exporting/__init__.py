"""Ship the student: a file for a target, verified against the student in that target's own runtime."""

from stillroom.exporting.artifact import Artifact, Exporter, Target, Written, load_artifact, versions_of
from stillroom.exporting.several import Exports, combinations, export_several
from stillroom.exporting.stage import export
from stillroom.exporting.targets import TARGETS, target_of
from stillroom.exporting.verify import TOLERANCES, Tolerance

__all__ = [
    "TARGETS",
    "TOLERANCES",
    "Artifact",
    "Exporter",
    "Exports",
    "Target",
    "Tolerance",
    "Written",
    "combinations",
    "export",
    "export_several",
    "load_artifact",
    "target_of",
    "versions_of",
]
