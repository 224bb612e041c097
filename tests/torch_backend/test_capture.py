"""Captures of a model's queries, keys and values, by the function and by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
from subgen_torch.transformers import capture
from subgen_torch.transformers.recording import recorded
from tiny_models import SIZES, build, build_sliding, tokens
from typer.testing import CliRunner

from subgen import attention
from subgen.__main__ import app
from subgen.io.captures import read_capture

SLIDING: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def test_attention_over_a_capture_is_what_the_model_computes() -> None:
    """The output projection of a layer takes the answers of all heads side by side."""
    model, ids, answers = build("Llama"), tokens(1, 50), []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: answers.append(args[0])
    )
    found = capture(model, ids, layers=[1], dtype="float32")
    hook.remove()
    assert (found.q.shape, found.k.shape, found.v.shape) == ((4, 50, 16), (2, 50, 16), (2, 50, 16))
    expected = answers[0][0].unflatten(-1, (4, 16)).transpose(0, 1)
    got = attention(found.q, found.k, found.v, causal=True)
    # Two programs that sum 50 products in float32.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_heads_of_all_layers_follow_each_other() -> None:
    model, ids = build("Llama"), tokens(1, 30)[0]
    whole = capture(model, ids)
    assert whole.k.dtype == np.float16
    for layer in (0, 1, -1):
        one, place = capture(model, ids, layers=[layer]), layer % 2
        assert np.array_equal(one.k, whole.k[2 * place : 2 * place + 2])
        assert np.array_equal(one.q, whole.q[4 * place : 4 * place + 4])


def test_another_softmax_scale_is_in_the_queries() -> None:
    model = build("Granite", attention_multiplier=0.5)
    with recorded(model) as layers, torch.inference_mode():
        model(tokens(1, 20), use_cache=False)
    assert layers[0].scale == 0.5
    found = capture(model, tokens(1, 20), layers=[0], dtype="float32")
    np.testing.assert_allclose(found.q, layers[0].queries[0].numpy() * 0.5 * 4, rtol=1e-6)


@pytest.mark.parametrize("attention_before", ["subgen", "sdpa", "eager"])
def test_the_model_keeps_its_attention(attention_before: str) -> None:
    model, ids = build("Llama", attention=attention_before), tokens(1, 20)
    expected = model(ids, use_cache=False).logits
    capture(model, ids)
    with pytest.raises(ValueError, match="inner"), recorded(model):
        raise ValueError("inner")
    assert model.config._attn_implementation == attention_before
    assert not any(hasattr(part, "_subgen_recorded") for part in model.modules())
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_layers_that_slide_are_left_out() -> None:
    model = build_sliding("Gemma3Text", "Gemma3", "sdpa", SLIDING)
    assert capture(model, tokens(1, 40), dtype="float32").k.shape[0] == 2
    with pytest.raises(ValueError, match=r"layers \[2\] slide.*\[1\]"):
        capture(model, tokens(1, 40), layers=[1, 2])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"layers": [2]}, ValueError, "layer 2 does not exist: the model has 2"),
        ({"layers": []}, ValueError, "empty"),
        ({"dtype": "bfloat16"}, ValueError, "float16"),
        ({"input_ids": tokens(2, 5)}, ValueError, "one text"),
        ({"input_ids": tokens(1, 0)}, ValueError, "one text"),
        ({"input_ids": torch.zeros(1, 5)}, ValueError, "integers"),
        ({"model": None}, TypeError, "takes a model"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"model": build("Llama"), "input_ids": tokens(1, 10), **given}
    with pytest.raises(error, match=match):
        capture(arguments.pop("model"), arguments.pop("input_ids"), **arguments)


def test_numbers_that_float16_cannot_hold_are_refused() -> None:
    model = build("Llama")
    model.model.layers[0].self_attn.v_proj.weight.data *= 1e6
    with pytest.raises(ValueError, match="float32"):
        capture(model, tokens(1, 10))
    assert np.isfinite(capture(model, tokens(1, 10), dtype="float32").v).all()
    model.model.layers[0].self_attn.v_proj.weight.data *= float("nan")
    with pytest.raises(ValueError, match="NaN"):
        capture(model, tokens(1, 10))


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    build("Llama", attention="sdpa").save_pretrained(path)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, ["capture", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_command_writes_what_the_function_gives(folder: Path, tmp_path: Path, kind: str) -> None:
    text, output = tmp_path / "text.txt", tmp_path / f"capture.{kind}"
    text.write_text(" ".join(f"w{i % 60 + 3}" for i in range(100)))
    done = invoke(folder, text, "-o", output, "--layers", "-1", "--length", 40)
    assert done.exit_code == 0, done.output
    assert "2 streams, 40 tokens" in done.output
    ids = torch.tensor([i % 60 + 3 for i in range(40)])
    expected, found = capture(build("Llama"), ids, layers=[1]), read_capture(output)
    for mine, theirs in ((found.q, expected.q), (found.k, expected.k), (found.v, expected.v)):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "nowhere/at/all"}, "no model with a tokenizer"),
        ({"text": "none.txt"}, "none.txt"),
        ({"output": "capture.txt"}, ".npz or .safetensors"),
        ({"layers": "first"}, "indices with commas"),
        ({"layers": "7"}, "does not exist"),
        ({"length": 0}, "at least 1"),
        ({"dtype": "int8"}, "float16"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text.txt").write_text("w1 w2 w3")
    given = {
        "model": folder,
        "text": "text.txt",
        "output": "capture.npz",
        "layers": "",
        "length": 9,
        "dtype": "float16",
    }
    given |= change
    options = [x for name in ("layers", "length", "dtype") for x in (f"--{name}", given[name])]
    done = invoke(given["model"], given["text"], "-o", given["output"], *options)
    assert done.exit_code == 2
    assert match in done.output
    assert not Path("capture.npz").exists()


def test_text_that_is_not_utf_8_or_empty_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe")
    assert "UTF-8" in invoke(folder, text, "-o", tmp_path / "c.npz").output
    text.write_text("")
    assert "empty" in invoke(folder, text, "-o", tmp_path / "c.npz").output
