"""The command line and the files it reads and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from subgen import AttentionSketch, attention
from subgen.__main__ import app
from subgen.evaluation.compare import METHODS, compare
from subgen.evaluation.stream import stream_capture
from subgen.io.captures import FileError, read_capture, sample, write_arrays


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 90, 8)).astype(np.float16)
    return {"q": rng.normal(size=(4, 90, 8)).astype(np.float16), "k": k, "v": v[..., :5].copy()}


@pytest.fixture(params=[".npz", ".safetensors"])
def file(request: pytest.FixtureRequest, arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    path = tmp_path / f"capture{request.param}"
    write_arrays(path, arrays)
    return path


def test_run_reports_error_bytes_clusters_and_time(file: Path, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    output, plot = tmp_path / "out.npz", tmp_path / "deep" / "plot.png"
    options = ("--max-clusters", 90, "--window", 8, "--paper", "--delta", 0, "--value-samples", 3000, "--block", 32)
    done = invoke("run", file, *options, "--output", output, "--plot", plot)
    assert done.exit_code == 0, done.output
    for words in ("relative error", "bytes held", "of the full cache", "Algorithm 1", "90, 90", "time"):
        assert words in done.output
    with np.load(output) as archive:
        outputs, paper = archive["subgen"], archive["Algorithm_1"]
    assert outputs.shape == (4, 90, 5)
    assert outputs.dtype == np.float16
    exact = attention(arrays["q"], arrays["k"], arrays["v"], causal=True).astype(np.float64)
    # As many clusters as tokens merge nothing: float16 is all the error.
    np.testing.assert_allclose(outputs, exact, atol=2e-3)
    # Every key its own cluster: the only error is that of sampling 3000 values, about sqrt(90 / 3000).
    assert np.linalg.norm(paper - exact) / np.linalg.norm(exact) < 0.4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_report_is_that_of_the_sketch(arrays: dict[str, np.ndarray], file: Path) -> None:
    capture = read_capture(file)
    make = {"delta": 3.0, "samples_per_cluster": 2, "value_samples": 20, "scale": 8**-0.5}
    done: list[int] = []
    report = stream_capture(AttentionSketch.paper(**make), capture, block=40, on_block=done.append)
    assert done == report.n.tolist() == [40, 80, 90]
    sketch = AttentionSketch.paper(**make)
    outputs = sketch.step(arrays["q"], arrays["k"], arrays["v"])
    np.testing.assert_allclose(report.outputs, outputs, atol=2e-3)
    np.testing.assert_array_equal(report.n_clusters, sketch.n_clusters)
    assert report.nbytes[-1] == sketch.nbytes
    assert report.full_nbytes[-1] == arrays["k"].nbytes + arrays["v"].nbytes
    exact = attention(arrays["q"], arrays["k"], arrays["v"], causal=True).astype(float)
    relative = np.linalg.norm(report.outputs - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert report.mean_error == pytest.approx(relative.mean())
    assert report.error[0] == pytest.approx(relative[:, :40].mean())
    with pytest.raises(ValueError, match="seen 90 tokens already"):
        stream_capture(sketch, capture)


def test_demo_runs_on_the_shipped_sample(tmp_path: Path) -> None:
    capture = sample()
    assert capture.k.shape == (2, 1536, 64)
    done = invoke("demo", "--block", 512, "--plot", tmp_path / "demo.png")
    assert done.exit_code == 0, done.output
    assert "shipped sample" in done.output
    assert "Algorithm 1" in done.output
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_compare_shows_every_method_and_marks_the_best(file: Path, tmp_path: Path) -> None:
    plot = tmp_path / "compare.png"
    options = ("--budget", 0.3, "--budget", 0.6, "--prefix", 70, "--stride", 4, "--window", 8)
    done = invoke("compare", file, *options, "--plot", plot)
    assert done.exit_code == 0, done.output
    for name in METHODS:
        assert name in done.output
    assert "30%, 21 pairs" in done.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_on_the_shipped_sample_the_default_is_ahead_of_every_rival() -> None:
    """At a tenth of the pairs, one query in 20. Measured: .043 here, .063 the next best, .086 the oracle."""
    done = invoke("compare", "--budget", 0.1, "--method", "subgen", "--method", "nystrom", "--method", "oracle")
    assert done.exit_code == 0, done.output
    rows = [line.strip(" │").split("│") for line in done.output.splitlines() if "%" in line and "│" in line]
    errors = {cells[0].strip(): float(cells[1]) for cells in rows if cells[0].strip()}
    assert min(errors, key=lambda name: errors[name]) == "subgen"


def test_plan_tells_both_sizes_and_the_verdict(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "capture.npz"
    write_arrays(path, {name: np.tile(x, (1, 2, 1)) for name, x in arrays.items()})
    done = invoke("plan", path, "--eps", 0.5, "--n", 5000, "--window", 8)
    assert done.exit_code == 0, done.output
    for words in ("samples per cluster", "mean relative error", "out of reach", "5,000 tokens"):
        assert words in " ".join(done.output.split())
    short = invoke("plan", path)
    assert short.exit_code == 2
    assert "180 tokens is too short" in " ".join(short.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", 2), "at most 1"),
        (("--budget", 0.01), "leaves no cluster"),
        (("--method", "magic"), "unknown methods"),
        (("--prefix", 90), "leaves none"),
        (("--stride", 0), "stride"),
    ],
)
def test_compare_with_bad_options_gets_one_clear_line(file: Path, arguments: tuple, words: str) -> None:
    done = invoke("compare", file, "--window", 8, *arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output


def test_backends_are_listed() -> None:
    done = invoke("backends")
    assert done.exit_code == 0
    assert "subgen_numpy:BACKEND" in done.output


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "subgen", "backends"], capture_output=True, text=True, check=True)
    assert "numpy" in done.stdout


def test_clusters_chooses_delta(file: Path) -> None:
    done = invoke("run", file, "--budget", 0.8, "--paper", "--clusters", 12)
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if "clusters: fewest, most" in line)
    fewest, most = (int(number) for number in row.strip(" │").split("│")[-1].split(","))
    assert 1 <= fewest <= most <= 12


def test_max_clusters_are_held(file: Path) -> None:
    done = invoke("run", file, "--max-clusters", 7, "--window", 8)
    assert done.exit_code == 0, done.output
    assert "7, 7" in done.output


def corrupt(file: Path, arrays: dict[str, np.ndarray], how: str) -> Path:
    data = file.read_bytes()
    if how == "missing":
        return file.with_name("nowhere.npz")
    if how == "other ending":
        return file.rename(file.with_suffix(".txt"))
    if how == "folder":
        return file.parent
    if how == "cut short":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "garbage":
        file.write_bytes(np.random.default_rng(1).bytes(5000))
    elif how == "altered":
        middle = len(data) // 2
        file.write_bytes(data[:20] + bytes(255 - byte for byte in data[20:200]) + data[200:middle] + data[middle:])
    else:
        changed = dict(arrays)
        if how == "without v":
            del changed["v"]
        elif how == "other names":
            changed = {"x": changed["q"]}
        elif how == "two axes":
            changed["q"] = changed["q"][0]
        elif how == "no tokens":
            changed = {name: x[:, :0] for name, x in changed.items()}
        elif how == "other length":
            changed["v"] = changed["v"][:, :50]
        elif how == "odd heads":
            changed["q"] = changed["q"][:3]
        elif how == "integers":
            changed["k"] = np.ones(changed["k"].shape, dtype=np.int32)
        elif how == "two dtypes":
            changed["k"] = changed["k"].astype(np.float32)
        elif how == "NaN":
            changed["v"] = changed["v"].copy()
            changed["v"][0, 3, 1] = np.nan
        write_arrays(file, changed)
    return file


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "no such file"),
        ("other ending", "cannot read files ending in '.txt'"),
        ("folder", "no such file"),
        ("cut short", "broken|not an .npz"),
        ("empty", "broken|not an .npz"),
        ("garbage", "broken|not an .npz"),
        ("altered", "broken|not an .npz"),
        ("without v", "lacks \\['v'\\]"),
        ("other names", "holds \\['x'\\] and lacks \\['k', 'q', 'v'\\]"),
        ("two axes", "q has shape \\(90, 8\\)"),
        ("no tokens", "has shape \\([24], 0, 8\\)"),
        ("other length", "do not fit"),
        ("odd heads", "do not fit"),
        ("integers", "int32"),
        ("two dtypes", "store one dtype"),
        ("NaN", "v holds NaN"),
    ],
)
def test_bad_files_get_one_clear_line(file: Path, arrays: dict[str, np.ndarray], how: str, words: str) -> None:
    path = corrupt(file, arrays, how)
    with pytest.raises(FileError, match=words):
        read_capture(path)
    done = invoke("run", path, "--max-clusters", 9)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert "error: " in done.output


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    objects = np.asarray([{"a": 1}], dtype=object)
    np.savez(path, q=objects, k=objects, v=objects)
    with pytest.raises(FileError, match="allow_pickle"):
        read_capture(path)


def test_bfloat16_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    x = np.asarray([[[1.0, -2.5], [0.15625, 3e38]]], dtype=np.float32)
    words = (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = {
        name: {"dtype": "BF16", "shape": [1, 2, 2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate("qkv")
    }
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + words * 3)
    capture = read_capture(path)
    assert capture.k.dtype == np.float32
    np.testing.assert_allclose(capture.k, x, rtol=2**-8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--paper", "--delta", -1), "delta must be"),
        (("--paper", "--samples-per-cluster", 0), "samples_per_cluster must be"),
        (("--paper", "--value-samples", 0), "value_samples must be"),
        (("--paper", "--clusters", 0), "n_clusters must be"),
        (("--paper", "--delta", 1, "--clusters", 3), "not both"),
        (("--delta", 1), "add --paper"),
        (("--budget", 0.1), "leaves no cluster"),
        (("--budget", 0), "--budget must be"),
        (("--budget", 1.5), "at most 1"),
        (("--budget", 0.9, "--max-clusters", 9), "not both"),
        (("--max-clusters", 0), "max_clusters must be"),
        (("--window", 1, "--max-clusters", 9), "window must be"),
        (("--scale", 0), "scale must be"),
        (("--output", "outputs.txt"), "must end in .npz or .safetensors"),
        (("--output", "/nowhere/outputs.npz"), "cannot be written"),
        (("--plot", "/proc/plot.png"), "cannot be written"),
        (("--block", 0), "--block"),
        (("--colour",), "No such option"),
    ],
)
def test_bad_options_get_one_clear_line(file: Path, arguments: tuple, words: str) -> None:
    sized = {"--budget", "--max-clusters"} & set(arguments)
    done = invoke("run", file, *(() if sized else ("--max-clusters", 9)), *arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output


def test_the_command_says_what_to_install() -> None:
    program = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('subgen', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "the command line needs typer: pip install 'subgen-attention[cli]'"


def test_a_comparison_prints_as_a_table_and_gives_columns(tmp_path: Path) -> None:
    result = compare(sample(), [0.1, 0.25], prefix=200, methods=["snapkv", "oracle"])
    columns = result.to_dict()
    assert columns["method"] == ["snapkv", "snapkv", "oracle", "oracle"]
    assert columns["budget"] == [0.1, 0.25] * 2
    assert columns["error"] == result.error.ravel().tolist()
    assert columns["worst_error"] == result.stream_error.max(axis=2).ravel().tolist()
    assert len({len(column) for column in columns.values()}) == 1
    assert json.loads(json.dumps(columns)) == columns
    table = repr(result).splitlines()
    assert len(table) == 4
    assert f"{result.error[1, 0]:.4f} {result.worst_error[1, 0]:.4f} 100.0%" in table[2]
    result.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
