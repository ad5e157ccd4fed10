"""fit(): trains a student from a recording or a live teacher.

loop.py is the training loop; devices.py and sharding.py say where it runs, checkpoint.py how it goes on after a kill.
"""

from stillroom.fitting.loop import fit

__all__ = ["fit"]
