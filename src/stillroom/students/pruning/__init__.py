"""Smaller networks cut from a trained one: fewer layers, narrower ones, fewer ids. See ``students.pruned``."""
