"""SubGen in `model.generate`: a cache for transformers that answers attention from sketches.

>>> from subgen_torch.transformers import SubGenCache, enable      # doctest: +SKIP
>>> enable(model)                                                  # doctest: +SKIP
>>> cache = SubGenCache(model.config, max_clusters=512)            # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                          # doctest: +SKIP
>>> print(cache.report())                                          # doctest: +SKIP

One forward pass: `cache.SubGenCache.update` hands new keys to a layer, the attention function in `functions` answers
from the layer, and `call` makes the new states of all layers count when the pass has succeeded.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "subgen_torch.transformers needs the transformers library, 4.57 or newer: pip install "
        "'subgen-attention[transformers]'"
    ) from error

from .cache import SubGenCache
from .recording import capture
from .report import CacheReport, LayerReport
from .switch import disable, enable

__all__ = ["CacheReport", "LayerReport", "SubGenCache", "capture", "disable", "enable"]
