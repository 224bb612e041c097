"""Sketches of Dask arrays, in this process and on a cluster of processes of which one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

import dask  # noqa: E402
from sketches import feed  # noqa: E402

import subgen  # noqa: E402
import subgen.dask  # noqa: E402

N, CHUNK = 600, 100


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((2, N, 8), (2, N, 6), (4, N, 8))]


def chunked(*, chunk: int = CHUNK) -> list[da.Array]:
    return [da.from_array(x, chunks=(1, chunk, 4)) for x in arrays()]


def template(**parameters: int) -> subgen.AttentionSketch:
    return subgen.AttentionSketch(30, window=16, **parameters)


def in_order(sketch: subgen.AttentionSketch) -> subgen.AttentionSketch:
    """What the graph is to give: six shards, merged as ((0 1) (2 3)) (4 5)."""
    shards = []
    for place in range(N // CHUNK):
        shard = subgen.AttentionSketch(30, window=16, residual_samples=sketch._method.residual_samples, seed=place)
        part = slice(CHUNK * place, CHUNK * (place + 1))
        feed(shard, *(x[:, part] for x in arrays()))
        shards.append(shard)
    pairs = [subgen.merge(*shards[i : i + 2]) for i in range(0, 6, 2)]
    return subgen.merge(subgen.merge(*pairs[:2]), pairs[2])


def bits(x: object) -> list[object]:
    """Everything that a state holds, arrays as bytes."""
    if hasattr(x, "__dataclass_fields__"):
        return [b for field in fields(x) if field.name != "owner" for b in bits(getattr(x, field.name))]
    return [x.tobytes()] if isinstance(x, np.ndarray) else [x]


@pytest.mark.parametrize("residual_samples", [0, 8])
def test_the_graph_merges_neighbours(residual_samples: int) -> None:
    empty = template(residual_samples=residual_samples)
    with dask.config.set(scheduler="synchronous"):
        got = subgen.dask.sketch(*chunked(), template=empty).compute()
    assert got.n_seen == N
    assert empty.n_seen == 0
    expected = in_order(empty)
    assert bits(got.state) == bits(expected.state)
    feed(got, *(x[:, :5] for x in arrays()))  # goes on
    assert got.n_seen == N + 5


def test_chunks_of_any_size_of_one_and_of_none() -> None:
    k, v, _ = arrays()
    with dask.config.set(scheduler="synchronous"):
        one = subgen.dask.sketch(da.from_array(k, chunks=-1), da.from_array(v, chunks=7), template=template()).compute()
        uneven = da.from_array(k, chunks=((2,), (1, 0, 250, 349), (8,)))
        many = subgen.dask.sketch(uneven, da.from_array(v), template=template()).compute()
    alone = template()
    alone.update(k, v)
    assert bits(one.state) == bits(alone.state)
    assert many.n_seen == N
    assert many.n_clusters.tolist() == [30, 30]


def test_the_papers_algorithm() -> None:
    k, v, _ = chunked()
    empty = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=20)
    with dask.config.set(scheduler="synchronous"):
        got = subgen.dask.sketch(k, v, template=empty).compute()
    assert got.n_seen == N
    assert np.isfinite(got.attend(arrays()[2][:, :3])).all()


def test_the_template_is_that_of_the_call() -> None:
    """What becomes of it before the graph is computed makes no difference."""
    k, v, q = chunked()
    empty = template()
    result = subgen.dask.sketch(k, v, q, template=empty)
    k, v, q = (x[:, :50] for x in arrays())
    empty.update(k, v, queries=q)
    with dask.config.set(scheduler="synchronous"):
        got = result.compute()
    assert (got.n_seen, empty.n_seen) == (N, 50)
    assert bits(got.state) == bits(in_order(template()).state)


def test_bad_input() -> None:
    k, v, q = chunked()
    seen = template()
    feed(seen, *arrays())
    with pytest.raises(TypeError, match=r"keys are a dask.array.Array, got numpy.ndarray: wrap them by"):
        subgen.dask.sketch(arrays()[0], v, template=template())
    with pytest.raises(TypeError, match="template is an empty AttentionSketch, got int"):
        subgen.dask.sketch(k, v, template=30)
    with pytest.raises(ValueError, match="template has seen 600 tokens"):
        subgen.dask.sketch(k, v, template=seen)
    with pytest.raises(ValueError, match=r"queries are of 599 tokens and keys of 600"):
        subgen.dask.sketch(k, v, q[:, 1:], template=template())
    with pytest.raises(ValueError, match=r"keys have no tokens: shape \(2, 0, 8\)"):
        subgen.dask.sketch(k[:, :0], v[:, :0], template=template())
    with pytest.raises(ValueError, match=r"keys have shape \(..., n, head_dim\), got \(8,\)"):
        subgen.dask.sketch(k[0, 0], v, template=template())
    with pytest.raises(ValueError, match=r"chunk sizes of values are unknown.*compute_chunk_sizes"):
        subgen.dask.sketch(k[0], v[0][v[0, :, 0] > 0], template=template())


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def killed_once(block: np.ndarray, flag: str, block_info: dict | None = None) -> np.ndarray:
    """Kill the worker that first asks for the fourth chunk, in the middle of the run."""
    if block_info is not None and block_info[0]["chunk-location"][1] == 3:
        try:
            Path(flag).touch(exist_ok=False)
        except FileExistsError:
            return block
        os.kill(os.getpid(), signal.SIGKILL)
    return block


def test_a_worker_that_dies_changes_no_byte(client: distributed.Client, tmp_path: Path) -> None:
    k, v, q = (da.from_array(x, chunks=(-1, CHUNK, -1)) for x in arrays())
    calm = subgen.dask.sketch(k, v, q, template=template(residual_samples=8)).compute()
    flag = tmp_path / "killed"
    before = set(client.scheduler_info(n_workers=-1)["workers"])
    deadly = k.map_blocks(killed_once, str(flag), dtype=k.dtype, meta=np.empty((0, 0, 0), k.dtype))
    stormy = subgen.dask.sketch(deadly, v, q, template=template(residual_samples=8)).compute()
    assert flag.exists()
    client.wait_for_workers(2, timeout=30)
    assert set(client.scheduler_info(n_workers=-1)["workers"]) != before  # one did die, and another took its place
    assert bits(stormy.state) == bits(calm.state) == bits(in_order(template(residual_samples=8)).state)
