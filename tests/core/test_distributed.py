"""Shards on ranks of torch.distributed: gloo between processes of this machine."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import subgen  # noqa: E402
from subgen.softmax import merge_attention  # noqa: E402

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from subgen_torch.distributed import attend  # noqa: E402

RANKS, TOKENS = 3, 40


def stream(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, RANKS * TOKENS, 8, generator=generator).to(dtype) for _ in range(2))
    return 3 * k, v, torch.randn(4, 5, 8, generator=generator).to(dtype)


def shard(rank: int, dtype: torch.dtype = torch.float32, window: int = 8) -> subgen.AttentionSketch:
    k, v, _ = stream(dtype)
    part = slice(rank * TOKENS, (rank + 1) * TOKENS)
    sketch = subgen.AttentionSketch(10, window=window)
    sketch.update(k[:, part], v[:, part])
    return sketch


def on_a_rank(rank: int, folder: str) -> None:
    """Save what `attend` gives in each case; an error by its text."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    _, v, queries = stream()
    empty = subgen.AttentionSketch(10, window=8)
    got = {
        "clusters": attend(shard(rank), queries, return_logsumexp=True),
        "exact": attend(shard(rank, window=TOKENS), queries),
        "double": attend(shard(rank, torch.float64, TOKENS), stream(torch.float64)[2]),
        "half": attend(shard(rank, torch.bfloat16, TOKENS), stream(torch.bfloat16)[2]),
        "one empty": attend(empty if rank == 1 else shard(rank, window=TOKENS), queries),
    }
    narrow = subgen.AttentionSketch(10, window=8)
    narrow.update(v, v[..., : 4 + 4 * (rank == 0)])
    for name, sketch in (("all empty", empty), ("values", narrow)):
        try:
            attend(sketch, queries)
        except (RuntimeError, ValueError) as error:
            got[name] = str(error)
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_every_rank_gets_the_same_bits(ranks) -> None:
    for other in ranks[1:]:
        for name, answer in ranks[0].items():
            for x, y in zip(
                answer if isinstance(answer, tuple) else (answer,),
                other[name] if isinstance(other[name], tuple) else (other[name],),
                strict=True,
            ):
                assert x == y if isinstance(x, str) else torch.equal(x, y)


def test_answers_of_clusters_are_put_together(ranks) -> None:
    queries = stream()[2]
    together = shard(0).attend(queries, return_logsumexp=True)
    for rank in range(1, RANKS):
        together = merge_attention(together, shard(rank).attend(queries, return_logsumexp=True))
    # Sums of three float32 in another order.
    for got, expected in zip(ranks[0]["clusters"], together, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    # The dtype's own rounding, of the parts and of the whole.
    [("exact", torch.float32, 1e-5), ("double", torch.float64, 1e-12), ("half", torch.bfloat16, 2e-2)],
)
def test_tokens_all_kept_give_exact_attention(ranks, name: str, dtype: torch.dtype, tolerance: float) -> None:
    k, v, queries = stream(dtype)
    got = ranks[0][name]
    assert got.dtype == dtype
    torch.testing.assert_close(got, subgen.attention(queries, k, v), rtol=tolerance, atol=tolerance)


def test_a_rank_without_tokens_adds_nothing(ranks) -> None:
    k, v, queries = stream()
    there = torch.cat([torch.arange(TOKENS), torch.arange(2 * TOKENS, 3 * TOKENS)])
    torch.testing.assert_close(
        ranks[1]["one empty"], subgen.attention(queries, k[:, there], v[:, there]), rtol=1e-5, atol=1e-5
    )


def test_errors_reach_every_rank(ranks) -> None:
    for got in ranks:
        assert "every rank's sketch is empty: call update" in got["all empty"]
        assert got["values"] == "value_dim is 4 on one rank and 8 on another: it must be the same on all"


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        attend(shard(0), stream()[2])
