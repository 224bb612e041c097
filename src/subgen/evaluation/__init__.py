"""Measure sketches: against exact attention, against other methods at equal bytes, and plans from a sample."""

__all__: list[str] = []
