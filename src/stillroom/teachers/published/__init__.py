"""Teachers that exist only as what they once answered: data sets of prompts with labels, numbers or texts."""

from stillroom.teachers.published.answers import Published, published

__all__ = ["Published", "published"]
