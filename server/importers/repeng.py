"""repeng's control vectors: GGUF files of the architecture `controlvector`.

The file. `ControlVector.export_gguf` (vgel/repeng, repeng/extract.py) writes one float32 tensor
[hidden_size] a layer, named `direction.N`, and the keys `controlvector.model_hint` (the
`model_type` of transformers) and `controlvector.layer_count` (how many directions there are).

The layers. N is a 0-based decoder layer whose output the direction is added to:

- repeng counts layers from 0, turning negative numbers into positive ones before it trains; it
  trains N on `hidden_states[N + 1]` (`batched_get_hiddens`), the output of layer N, and adds it to
  the output of `layers[N]` (`ControlModule.forward`, repeng/control.py). So it has been since the
  export exists (commit 6a5e9ec, February 2024). Only by request is there a direction for layer 0.
- llama.cpp agrees on where to add: `llama_adapter_cvec::apply` (src/llama-adapter.cpp) keeps
  `direction.N` as the tensor of its 0-based layer N, and the graphs add it where that layer ends
  (`build_cvec(cur, il)`). It has nothing for layer 0 and refuses `direction.0`.

Two things to know about what a direction was trained on. transformers puts the final norm between
the last layer and its last hidden state, so repeng's direction of the last layer comes from after
that norm although it is added before. And llama.cpp's own generator of such files
(tools/cvector-generator) names the output of layer i `direction.(i + 1)`, one layer above where it
was read; here, as in llama.cpp, it acts where its name says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.server.importers.imported import ImportedVectors

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "repeng"
ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")

MAX_HINT = 100
"""How many characters of the file's model hint are kept."""


def read(path: Path) -> ImportedVectors:
    """The directions of a control vector.

    Raises ValueError that says what is wrong with the file, OSError, and ImportError where the
    package gguf is missing.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFReader
    except ImportError:
        raise ImportError('reading GGUF needs a package: pip install "headway[models]"') from None
    try:
        reader = GGUFReader(path)
        architecture, hint, layer_count = (
            _value(reader, key)
            for key in (
                "general.architecture",
                f"{ARCHITECTURE}.model_hint",
                f"{ARCHITECTURE}.layer_count",
            )
        )
    # What the reader raises for a damaged file depends on where it happens to be damaged.
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"cannot be read as GGUF: {error}") from None
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"is a GGUF file of the architecture {architecture!r}; "
            f"control vectors have {ARCHITECTURE!r}"
        )
    directions = {}
    for tensor in reader.tensors:
        match = DIRECTION.fullmatch(tensor.name)
        if match is None:
            raise ValueError(
                f"unknown tensor {tensor.name!r}; a control vector has direction.N, N a layer"
            )
        if tensor.tensor_type != GGMLQuantizationType.F32 or tensor.data.ndim != 1:
            raise ValueError(
                f"{tensor.name} is {tensor.tensor_type.name} {list(tensor.data.shape)}; "
                "expected F32 [hidden_size]"
            )
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)
    facts: dict[str, Any] = {}
    if hint is not None:
        facts["model_hint"] = str(hint)[:MAX_HINT]
    if isinstance(layer_count, int):
        facts["layer_count"] = layer_count
    return ImportedVectors(NAME, directions, facts)


def _value(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata key, None if there is none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
