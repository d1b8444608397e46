"""What steering needs to know about a model: its sizes, and nothing of the engine serving it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.steering.profiles import Profiles

FROM_PROFILES = ("sink_dims", "profiles")
"""The fields of a model's geometry that profiles give."""


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes of a decoder-only transformer, for the whole model (not one tensor-parallel rank).

    Layers and heads are 0-based; heads are query heads, so under grouped-query attention a head
    index runs to `num_heads`, not to `num_kv_heads`. sink_dims: the dimensions of the residual
    stream that tell sinks (see `headway.steering.sinks`), () where they are not known.
    profiles: those that requests may name, None for none.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    supports_images: bool = False
    quantized: bool = False
    architecture: str = ""
    sink_dims: tuple[int, ...] = ()
    profiles: Profiles | None = field(default=None, compare=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex, 16 digits) over the sizes: two models that differ here share nothing.

        Leaves out what comes from profiles, which name the fingerprint themselves.
        """
        sizes = {name: value for name, value in vars(self).items() if name not in FROM_PROFILES}
        canonical = json.dumps(sizes, sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]
