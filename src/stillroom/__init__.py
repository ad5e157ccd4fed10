"""stillroom distils a large model into a small one, measures what was kept, ships it, and proves what it learned from.

Ask the teacher once, train any student, measure honestly, ship it, prove where it came from.
The public names below are loaded when they are first used, so that ``stillroom --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom import divergences as divergences
    from stillroom import likeness as likeness
    from stillroom import provenance as provenance
    from stillroom import testing as testing
    from stillroom.checking import preflight as preflight
    from stillroom.data import Packed as Packed
    from stillroom.data import Table as Table
    from stillroom.data import pack as pack
    from stillroom.errors import StillroomError as StillroomError
    from stillroom.evaluation import Report as Report
    from stillroom.evaluation import evaluate as evaluate
    from stillroom.exporting import Artifact as Artifact
    from stillroom.exporting import export as export
    from stillroom.fitting import fit as fit
    from stillroom.loading import load as load
    from stillroom.network import Columns as Columns
    from stillroom.objectives import HardLabels as HardLabels
    from stillroom.objectives import MatchActions as MatchActions
    from stillroom.objectives import MatchGaussians as MatchGaussians
    from stillroom.objectives import MatchValues as MatchValues
    from stillroom.objectives import Mix as Mix
    from stillroom.objectives import SoftTargets as SoftTargets
    from stillroom.objectives import masked_mean as masked_mean
    from stillroom.objectives.features import MatchFeatures as MatchFeatures
    from stillroom.objectives.features import MatchRelations as MatchRelations
    from stillroom.objectives.on_policy import SampledReverseKL as SampledReverseKL
    from stillroom.plan import Plan as Plan
    from stillroom.recording import Everything as Everything
    from stillroom.recording import Features as Features
    from stillroom.recording import Hidden as Hidden
    from stillroom.recording import Likely as Likely
    from stillroom.recording import Recording as Recording
    from stillroom.recording import Sampled as Sampled
    from stillroom.recording import Texts as Texts
    from stillroom.recording import TopK as TopK
    from stillroom.recording import record as record
    from stillroom.rollouts import Rollouts as Rollouts
    from stillroom.students import Student as Student
    from stillroom.students.quantised import quantised as quantised
    from stillroom.teachers import ensemble as ensemble
    from stillroom.teachers import from_network as from_network
    from stillroom.teachers.causal import causal_lm as causal_lm
    from stillroom.types import Batch as Batch
    from stillroom.types import Dense as Dense
    from stillroom.types import Examples as Examples
    from stillroom.types import Identity as Identity
    from stillroom.types import Metric as Metric
    from stillroom.types import Model as Model
    from stillroom.types import Objective as Objective
    from stillroom.types import Projected as Projected
    from stillroom.types import Signal as Signal
    from stillroom.types import Sparse as Sparse

__version__ = "0.1.0"

_PLACES = {
    "stillroom": ("divergences", "likeness", "provenance", "testing"),
    "stillroom.data": ("Packed", "Table", "pack"),
    "stillroom.errors": ("StillroomError",),
    "stillroom.evaluation": ("Report", "evaluate"),
    "stillroom.exporting": ("Artifact", "export"),
    "stillroom.objectives.features": ("MatchFeatures", "MatchRelations"),
    "stillroom.fitting": ("fit",),
    "stillroom.loading": ("load",),
    "stillroom.network": ("Columns",),
    "stillroom.objectives": (
        "HardLabels",
        "MatchActions",
        "MatchGaussians",
        "MatchValues",
        "Mix",
        "SoftTargets",
        "masked_mean",
    ),
    "stillroom.objectives.on_policy": ("SampledReverseKL",),
    "stillroom.plan": ("Plan",),
    "stillroom.checking": ("preflight",),
    "stillroom.recording": (
        "Everything",
        "Features",
        "Hidden",
        "Likely",
        "Recording",
        "Sampled",
        "Texts",
        "TopK",
        "record",
    ),
    "stillroom.rollouts": ("Rollouts",),
    "stillroom.students": ("Student",),
    "stillroom.students.quantised": ("quantised",),
    "stillroom.teachers": ("ensemble", "from_network"),
    "stillroom.teachers.causal": ("causal_lm",),
    "stillroom.types": (
        "Batch",
        "Dense",
        "Examples",
        "Identity",
        "Metric",
        "Model",
        "Objective",
        "Projected",
        "Signal",
        "Sparse",
    ),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
__all__ = ["__version__", *sorted(_PLACE_OF)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    place = _PLACE_OF.get(name)
    if place is None:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
    if place == "stillroom":
        return import_module(f"stillroom.{name}")
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return __all__
