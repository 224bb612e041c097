"""What a cache holds, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheReport", "LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """Of one layer.

    Attributes
    ----------
    kind : str
        "sketch", or "exact" for a layer that slides over a window and is kept as it is.
    n_seen : int
        Tokens of the longest row, padding included.
    n_clusters : int
        Clusters of the head that has most.
    nbytes : int
        Bytes held, bookkeeping included.
    exact_nbytes : int
        Bytes that all keys and values seen would take.
    """

    kind: str
    n_seen: int
    n_clusters: int
    nbytes: int
    exact_nbytes: int

    @property
    def ratio(self) -> float:
        """Bytes held, as a share of an exact cache."""
        return self.nbytes / self.exact_nbytes if self.exact_nbytes else 0.0


@dataclass(frozen=True)
class CacheReport:
    """Of all layers; prints as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def total(self) -> LayerReport:
        """The layers together: bytes add up, the rest is the most of any layer."""
        return LayerReport(
            kind="all",
            n_seen=max((layer.n_seen for layer in self.layers), default=0),
            n_clusters=max((layer.n_clusters for layer in self.layers), default=0),
            nbytes=sum(layer.nbytes for layer in self.layers),
            exact_nbytes=sum(layer.exact_nbytes for layer in self.layers),
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "tokens", "clusters", "bytes", "exact bytes", "share")]
        for name, layer in [*((str(i), layer) for i, layer in enumerate(self.layers)), ("all", self.total)]:
            numbers = (layer.n_seen, layer.n_clusters, layer.nbytes, layer.exact_nbytes)
            rows.append((name, layer.kind, *(f"{x:,}" for x in numbers), f"{layer.ratio:.1%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(x.rjust(width) for x, width in zip(row, widths, strict=True)) for row in rows)
