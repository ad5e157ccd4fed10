"""Teachers: one file per kind. Any function from a batch to a signal is one too."""

from stillroom.teachers.ensemble import Ensemble, ensemble
from stillroom.teachers.networks import Network, from_network

__all__ = ["Ensemble", "Network", "ensemble", "from_network"]
