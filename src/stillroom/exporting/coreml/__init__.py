"""Core ML: written here, run on macOS only."""
