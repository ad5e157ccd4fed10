"""Teachers that can only be asked: any OpenAI-compatible server. A recipe's ``endpoint`` is ``making.endpoint``."""

from stillroom.teachers.endpoint.making import endpoint
from stillroom.teachers.endpoint.teacher import Endpoint

__all__ = ["Endpoint", "endpoint"]
