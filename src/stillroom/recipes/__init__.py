"""Recipes (YAML) and what their names stand for.

recipe.py: the settings; named.py: teachers, students and metrics by name; parts.py, sources.py, corpus.py and
starts.py: the objects that a recipe describes.
"""

from stillroom.recipes.recipe import Recipe, Use
from stillroom.recipes.yaml_file import keep_recipe, load_recipe

__all__ = ["Recipe", "Use", "keep_recipe", "load_recipe"]
