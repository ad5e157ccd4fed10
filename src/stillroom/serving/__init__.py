"""Serving: a student over HTTP, in batches, with a teacher behind it where it is not sure."""
