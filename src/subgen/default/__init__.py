"""Cluster means, the default sketch: exact sinks and recent tokens, and clusters merged to means."""

__all__: list[str] = []
