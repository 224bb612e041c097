"""`SubGenCache` of CUDA tensors: what a model asks of the kernels, which the emulation executes."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import cuda_labs  # noqa: E402
from subgen_cupy import _operations, _torch, torch_backend  # noqa: E402
from subgen_torch import OWN  # noqa: E402
from test_transformers import build, generate, logits, small, tokens  # noqa: E402

from subgen import backends  # noqa: E402


def answers(model: Any, storage: str) -> list[Any]:
    """A padded batch, block by block and token by token; an answer; a long prompt; without inference mode, too."""
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
def test_a_model_is_answered_by_the_kernels_as_by_torch(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, model = cuda_labs.emulation_for_torch(), build("Llama")

    def use(backend: backends.Backend) -> None:
        operations = backends.Operations(**backend.operations)
        monkeypatch.setattr(backends, "_resolved", {**backends._resolved, "torch": operations})

    use(OWN)
    expected = answers(model, storage)
    use(torch_backend())
    monkeypatch.setattr(_operations, "device_of", lambda x: lab.device)
    monkeypatch.setattr(_torch, "on_cuda", lambda x: True)
    got = answers(model, storage)
    # Sums of float32 in another order; no two costs of these tokens are so near that they merge otherwise.
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    launched = {launch.kernel for launch in lab.device.launches}  # type: ignore[attr-defined]
    assert {"take_in", "attend_split", "query_codes", "match_pairs", "settle"} <= launched
