"""C: source that needs a compiler and nothing else, called through ctypes; ``source`` writes it, ``guard`` wraps it."""
