"""The checks before anything long starts (``preflight``), and what a run will cost (``estimate``)."""

from stillroom.checking.cost import Estimate, estimate, show
from stillroom.checking.pair import Check, featured, preflight

__all__ = ["Check", "Estimate", "estimate", "featured", "preflight", "show"]
