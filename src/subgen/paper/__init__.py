"""Algorithm 1 of SubGen (arXiv 2402.06082)."""

__all__: list[str] = []
