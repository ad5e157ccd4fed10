"""On-policy distillation: the student writes, the teacher scores what it wrote, and the student learns from that."""

from stillroom.rollouts.on_policy import Rollouts

__all__ = ["Rollouts"]
