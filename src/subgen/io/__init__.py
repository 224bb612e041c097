"""Files: saved sketches, and captured queries, keys and values."""

__all__: list[str] = []
