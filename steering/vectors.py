"""Vector profiles: what activation steering adds, layer by layer or head by head.

A profile is one safetensors file. Its metadata key `headway` holds a JSON header, a `VectorHeader`;
its tensors are, by kind:

    gact   directions, probe_weights float32 [num_edited, num_clusters, hidden_size],
           probe_bias float32 [num_edited, num_clusters]
    caa    directions float32 [num_edited, 1, hidden_size]
    act    shifts float32 [num_edited, head_size]

row i being for the layer `layers[i]` (gact, caa) or for the head `heads[i]` (act). A file is named
by the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from headway.steering.artifacts import ResidualArtifact
from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.profiles import Index, NamedProfiles, Profile, check_ascending
from headway.steering.program import ResidualSite
from headway.steering.validation import StrictModel

METADATA_KEY = "headway"
"""Key of the safetensors metadata under which the header stands."""

MAX_CLUSTERS = 16
"""Most directions of a layer."""

MAX_VECTORS_BYTES = 256 * 1024 * 1024
"""Largest file of a vector profile."""


class FeedbackRule(StrictModel):
    """How the probes of a profile may be refined while it is served.

    batch: how many pieces of feedback make a new version; learning_rate: of the gradient step that
    each of them is, in units of logits (`headway.steering.refinement`).
    """

    batch: Annotated[int, Field(ge=1, le=1024)] = 8
    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 0.05


class VectorHeader(Profile):
    """What a vector profile says about itself.

    layers: those with directions, ascending; heads: those with shifts, (layer, head), ascending.
    site: where the residual stream is read and edited. strength: a value to begin with, in the
    units of the method. feedback: None where the profile must stay as it is. training: facts of its
    making, for people. licence: SPDX expression of what it was made from. command: what made it.
    """

    kind: Literal["gact", "caa", "act"]
    layers: tuple[Index, ...] = ()
    heads: tuple[tuple[Index, Index], ...] = ()
    site: ResidualSite = ResidualSite.BLOCK_OUTPUT
    strength: Annotated[float, Field(ge=-100.0, le=100.0)] = 1.0
    feedback: FeedbackRule | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    licence: str = ""
    command: str = ""

    def check_shapes(self, param: str) -> None:
        """Raise SteeringError(E_BAD_PARAM) where the parts of the header do not fit together."""
        used, unused = ("heads", "layers") if self.kind == "act" else ("layers", "heads")
        if not getattr(self, used):
            message = f"a profile of the kind {self.kind} needs at least one"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.{used}")
        if getattr(self, unused):
            message = f"a profile of the kind {self.kind} has none"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.{unused}")
        if self.feedback is not None and self.kind != "gact":
            message = f"a profile of the kind {self.kind} has no probe to refine"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.feedback")
        check_ascending(self.layers, self.num_layers, "layer", f"{param}.layers")
        for index, head in enumerate(self.heads):
            where = f"{param}.heads[{index}]"
            if head[0] >= self.num_layers:
                message = f"layer {head[0]} does not exist; allowed: 0 .. {self.num_layers - 1}"
                raise SteeringError(Reason.LAYER_RANGE, message, where)
            if index and head <= self.heads[index - 1]:
                raise SteeringError(Reason.BAD_PARAM, "the heads must ascend", where)


@dataclass(frozen=True, eq=False)
class VectorProfile:
    """A vector profile in memory; immutable.

    tensors: float32 by name, as the module says. digest: SHA-256 (hex) of the file's bytes.

    Raises SteeringError(E_BAD_PARAM), naming the tensor under `param`, for tensors that are
    missing, too many, of the wrong shape or dtype, or not finite.
    """

    header: VectorHeader
    tensors: Mapping[str, np.ndarray]
    digest: str = ""
    param: str = "profile"

    def __post_init__(self) -> None:
        expected = self._expected_tensors()
        for name in (*expected, *self.tensors):
            where = f"{self.param}.{name}"
            if name not in self.tensors:
                raise SteeringError(Reason.BAD_PARAM, "the tensor is missing", where)
            if name not in expected:
                message = f"unknown tensor; those of {self.kind} are: {', '.join(expected)}"
                raise SteeringError(Reason.BAD_PARAM, message, where)
            array, dims = self.tensors[name], expected[name]
            fits = array.ndim == len(dims) and all(
                size == wanted for size, wanted in zip(array.shape, dims, strict=True) if wanted
            )
            if not fits:
                message = f"has shape {list(array.shape)}; expected {_shape_words(dims)}"
                raise SteeringError(Reason.BAD_PARAM, message, where)
            if array.dtype != np.float32:
                raise SteeringError(
                    Reason.BAD_PARAM, f"has dtype {array.dtype}; expected float32", where
                )
            if not np.isfinite(array).all():
                raise SteeringError(Reason.BAD_PARAM, "holds values that are not finite", where)
        self._check_clusters()

    @property
    def kind(self) -> str:
        """Which method it is for."""
        return self.header.kind

    @property
    def num_clusters(self) -> int:
        """Directions of each layer; 0 for shifts of heads."""
        return self.tensors["directions"].shape[1] if "directions" in self.tensors else 0

    @property
    def takes_feedback(self) -> bool:
        """Whether its probes may be refined, and have something to tell apart."""
        return self.header.feedback is not None and self.num_clusters > 1

    @cached_property
    def artifacts(self) -> dict[int, ResidualArtifact]:
        """Layer -> its directions and probe, as the engine takes them; none for shifts of heads."""
        found = {}
        for index, layer in enumerate(self.header.layers):
            directions = self.tensors["directions"][index]
            weights = self.tensors.get("probe_weights")
            bias = self.tensors.get("probe_bias")
            if weights is None or bias is None:
                found[layer] = ResidualArtifact.constant(directions[0])
            else:
                found[layer] = ResidualArtifact(directions, weights[index], bias[index])
        return found

    def check_model(self, geometry: ModelGeometry, param: str = "profile") -> None:
        """Raise SteeringError(E_PROFILE_MISMATCH) if it was made for a model of other sizes."""
        self.header.check_model(geometry, param)
        if self.kind != "act":
            return
        for index, (_, head) in enumerate(self.header.heads):
            if head >= geometry.num_heads:
                message = f"head {head} does not exist; allowed: 0 .. {geometry.num_heads - 1}"
                raise SteeringError(Reason.HEAD_RANGE, message, f"{param}.heads[{index}][1]")
        if self.tensors["shifts"].shape[1] != geometry.head_size:
            size = self.tensors["shifts"].shape[1]
            message = f"its shifts have {size} values; the model's head size: {geometry.head_size}"
            raise SteeringError(Reason.PROFILE_MISMATCH, message, f"{param}.shifts")

    def save(self, path: Path) -> str:
        """Write the file and return its digest. The same profile gives the same bytes."""
        header = self.header.model_dump_json()
        arrays = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        content = save(arrays, metadata={METADATA_KEY: header})
        path.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, path: Path, param: str = "profile") -> VectorProfile:
        """Read a file. Raises SteeringError(E_BAD_PARAM or E_TOO_LARGE), naming what is wrong."""
        try:
            size = path.stat().st_size
            if size > MAX_VECTORS_BYTES:
                message = f"has {size} bytes; at most {MAX_VECTORS_BYTES} are allowed"
                raise SteeringError(Reason.TOO_LARGE, message, param)
            with _opened(path) as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
                if text is None:
                    message = f"is a safetensors file without the metadata {METADATA_KEY!r}"
                    raise SteeringError(Reason.BAD_PARAM, message, param)
                header = VectorHeader.parse(json.loads(text), f"{param}.header")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(header, tensors, file_digest(path), param)
        except SteeringError:
            raise
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            message = f"cannot be read as a vector profile: {error}"
            raise SteeringError(Reason.BAD_PARAM, message, param) from None

    def _expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> sizes, 0 for any size."""
        hidden, edited = self.header.hidden_size, len(self.header.layers)
        if self.kind == "act":
            return {"shifts": (len(self.header.heads), 0)}
        if self.kind == "caa":
            return {"directions": (edited, 1, hidden)}
        clusters = 0
        if "directions" in self.tensors and self.tensors["directions"].ndim == 3:
            clusters = self.tensors["directions"].shape[1]
        vectors = edited, clusters, hidden
        return {"directions": vectors, "probe_weights": vectors, "probe_bias": vectors[:2]}

    def _check_clusters(self) -> None:
        if self.kind == "gact" and not 1 <= self.num_clusters <= MAX_CLUSTERS:
            message = f"has {self.num_clusters} directions a layer; allowed: 1 .. {MAX_CLUSTERS}"
            raise SteeringError(Reason.BAD_PARAM, message, f"{self.param}.directions")


def given_artifacts(geometry: ModelGeometry) -> dict[str, ResidualArtifact]:
    """Digest -> artefact, of the vector profiles that a server was started with."""
    named = geometry.profiles
    given = named.profiles.values() if isinstance(named, NamedProfiles) else ()
    vectors = (profile for profile in given if isinstance(profile, VectorProfile))
    return {each.digest: each for profile in vectors for each in profile.artifacts.values()}


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with safe_open(str(path), framework="numpy") as file:
        yield file


def _shape_words(dims: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) if size else "any" for size in dims) + "]"
