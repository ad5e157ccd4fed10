"""Students: a network with the adapter that reaches it, small architectures, and classic baselines."""

from stillroom.students.networks import Source, Student, load_student, save_student

__all__ = ["Source", "Student", "load_student", "save_student"]
