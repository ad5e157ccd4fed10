"""Policies in closed loop: a task, driving it, who drives while the teacher is asked, and how well it went."""

from stillroom.control.driving import drive
from stillroom.control.episodes import Episodes, joined, read_episodes, write_episodes
from stillroom.control.outcomes import METRICS, Outcomes, outcomes_of
from stillroom.control.task import Task, environment_of
from stillroom.control.ways import WAYS, Round, rounds_of

__all__ = [
    "METRICS",
    "WAYS",
    "Episodes",
    "Outcomes",
    "Round",
    "Task",
    "drive",
    "environment_of",
    "joined",
    "outcomes_of",
    "read_episodes",
    "rounds_of",
    "write_episodes",
]
