"""Independent tests of what a student learned from. Pure functions on arrays; nothing here asks or trains a model.

``teacher_test`` ranks a candidate teacher among decoys of its recipe, ``transcript_test`` ranks a transcript among
fresh ones, ``design`` plans either. A result rejects independence or reads "no evidence at power x"; it never says that
a student did not learn from a teacher, and it misses diluted or paraphrased use.
"""

from stillroom.provenance.audit.decoys import Columns, check_columns
from stillroom.provenance.audit.power import Design, Power, design, fewest, floor_of, measured, rank_power, wilson
from stillroom.provenance.audit.ranks import exact_p, holm, randomised_p
from stillroom.provenance.audit.statistics import DECLARED, FRESH, MODES, Mode
from stillroom.provenance.audit.teacher import COMPARATIVE, TeacherEvidence, over_candidates, teacher_test
from stillroom.provenance.audit.transcript import TranscriptEvidence, deterministic, transcript_test

__all__ = [
    "COMPARATIVE",
    "DECLARED",
    "FRESH",
    "MODES",
    "Columns",
    "Design",
    "Mode",
    "Power",
    "TeacherEvidence",
    "TranscriptEvidence",
    "check_columns",
    "design",
    "deterministic",
    "exact_p",
    "fewest",
    "floor_of",
    "holm",
    "measured",
    "over_candidates",
    "randomised_p",
    "rank_power",
    "teacher_test",
    "transcript_test",
    "wilson",
]
