"""Vectors of the library steering-vectors: PyTorch files.

The library (steering-vectors/steering-vectors, steering_vectors/steering_vector.py) has a dataclass
`SteeringVector(layer_activations: dict[int, Tensor], layer_type: str = "decoder_block")` and no
file format; people save it with `torch.save`. A file of the dataclass itself is a pickle, which can
run any code, and is never loaded here. Two plain forms are:

    {"layer_activations": {layer: tensor [hidden_size], ...}, "layer_type": "decoder_block"}
    {layer: tensor [hidden_size], ...}

The layers. A number is the 0-based position among the modules that a template such as
`model.layers.{num}` matches (`collect_matching_layers`, layer_matching.py), and
`SteeringVector.patch_activations` adds multiplier * tensor to the output of that module. For the
layer type `decoder_block` that is the output of the decoder layer of the same number. The other
types (`self_attn`, `mlp`, `input_layernorm`, `post_attention_layernorm`) are places inside of it,
where a profile of the kind caa does not add. Training records layers under their positive numbers
even if asked for negative ones (`record_activations`).
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.server.importers.imported import ImportedVectors

NAME = "steering-vectors"
ACTIVATIONS = "layer_activations"
LAYER_TYPE = "layer_type"
DECODER_BLOCK = "decoder_block"

CONVERT = """\
Loading such objects can run any code, so it is not done here. If you trust the file, convert it \
where its library is installed:
    v = torch.load({path!r}, weights_only=False)
    torch.save({{"layer_activations": v.layer_activations, "layer_type": v.layer_type}}, "new.pt")\
"""


def read(path: Path) -> ImportedVectors:
    """The directions of a steering vector; nothing but plain tensors is ever unpickled.

    Raises ValueError that says what is wrong with the file, and OSError.
    """
    saved = _load(path)
    if not isinstance(saved, dict):
        raise ValueError(
            f"holds a {type(saved).__name__}; expected a dict of layer -> tensor, or one with the "
            f"keys {ACTIVATIONS!r} and {LAYER_TYPE!r}"
        )
    activations = saved
    if ACTIVATIONS in saved:
        activations = saved[ACTIVATIONS]
        for key in saved:
            if key not in (ACTIVATIONS, LAYER_TYPE):
                raise ValueError(
                    f"unknown key {key!r}; expected {ACTIVATIONS!r} and {LAYER_TYPE!r}"
                )
        layer_type = saved.get(LAYER_TYPE, DECODER_BLOCK)
        if layer_type != DECODER_BLOCK:
            raise ValueError(
                f"was made for the layer type {layer_type!r}; only {DECODER_BLOCK!r} can be "
                "imported: profiles add to the output of whole decoder layers"
            )
        if not isinstance(activations, dict):
            raise ValueError(f"{ACTIVATIONS!r} must be a dict of layer -> tensor")
    directions = {_layer(key): _direction(key, value) for key, value in activations.items()}
    return ImportedVectors(NAME, directions, {LAYER_TYPE: DECODER_BLOCK})


def _load(path: Path) -> Any:
    """What `torch.save` put into a file, if it is made of plain containers and tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is none of PyTorch's fails in many ways
        objects = _objects(path)
        if objects:
            holds = f"holds Python objects: {', '.join(objects)}. "
            raise ValueError(holds + CONVERT.format(path=path.name)) from None
        if isinstance(error, pickle.UnpicklingError):
            message = "is no file of plain tensors that torch.save wrote. If it is a pickle: "
            raise ValueError(message + CONVERT.format(path=path.name)) from None
        raise ValueError(f"cannot be read as a PyTorch file: {error}") from None


def _objects(path: Path) -> list[str]:
    """The classes and functions that a PyTorch file refers to and that are not plain data.

    PyTorch finds them by reading the instructions of the pickle without following them.
    """
    try:
        found: list[str] = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only for the message: files of older PyTorch cannot be examined
        return []
    return sorted(found)


def _layer(key: object) -> int:
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(f"layers must be integers, got {key!r}")
    if key < 0:
        raise ValueError(
            f"layer {key} counts from the end, which depends on the model; number it from 0"
        )
    return key


def _direction(layer: object, value: object) -> np.ndarray:
    """float32 [size] of a tensor in the file."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"layer {layer} has a {type(value).__name__}; expected a tensor")
    usable = value.layout is torch.strided and not value.is_nested and value.device.type == "cpu"
    if not usable or not value.dtype.is_floating_point or value.ndim != 1:
        words = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise ValueError(f"layer {layer} has {words}; expected floating point [hidden_size]")
    # A view may claim to be far larger than what the file stores.
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"layer {layer} has {value.numel()} values, more than the file stores")
    array: np.ndarray = value.detach().to(torch.float32).contiguous().numpy()
    return array
