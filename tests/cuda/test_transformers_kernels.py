"""`SubGenCache` of CUDA tensors: a model whose attention runs on the kernels, which the emulation executes."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import cuda_targets  # noqa: E402
from cuda_targets import using_kernels  # noqa: E402
from subgen_torch import WITHOUT_CUPY  # noqa: E402
from tiny_models import build, generate, logits, small, tokens  # noqa: E402

from subgen import backends  # noqa: E402

pytestmark = pytest.mark.slow


def answers(model: Any, storage: str) -> list[Any]:
    """Return logits of a padded batch, block by block and token by token; an answer; a long prompt; in both modes."""
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    blocks = [tokens(2, 24), tokens(2, 6, 1), *(tokens(2, 1, seed) for seed in range(2, 12))]
    with torch.inference_mode():
        found = [
            logits(model, blocks, small(model, storage=storage), mask),
            generate(model, tokens(1, 40), small(model, storage=storage)),
            logits(model, [tokens(1, 90, 5), tokens(1, 1, 6)], small(model, storage=storage)),
        ]
    with torch.no_grad():
        found.append(
            logits(model, [tokens(2, 30, 5), *(tokens(2, 1, seed) for seed in range(8))], small(model, storage=storage))
        )
    return found


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_model_on_the_kernels_answers_as_on_torch(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = cuda_targets.emulation_for_torch(), build("Llama")
    monkeypatch.setitem(backends._resolved, "torch", WITHOUT_CUPY.operations)
    expected = answers(model, storage)
    with using_kernels(target):
        got = answers(model, storage)
    # Sums of float32 in another order; no two costs of these tokens are so near that they merge otherwise.
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    launched = {launch.kernel for launch in target.launches}
    assert {"append_token", "attend_split", "quantize_queries", "match_pairs", "store"} <= launched
