"""Teachers that exist only as what they once answered: data sets of prompts with labels, numbers or texts."""

from stillroom.teachers.published.answers import Published, published
from stillroom.teachers.published.tokens import PublishedTokens, published_tokens

__all__ = ["Published", "PublishedTokens", "published", "published_tokens"]
