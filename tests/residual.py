"""Residual edits for tests: drawn artefacts, programs with them, the formula on HF models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from headway.steering.artifacts import ResidualArtifact
from headway.steering.program import AppliedMethod, QueryScope, ResidualEdit, SteeringProgram


def drawn_artifact(seed: int, hidden_size: int, num_clusters: int = 3) -> ResidualArtifact:
    """Unit directions, and a probe that tells rows apart."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((num_clusters, hidden_size)).astype(np.float32)
    weights = draw.standard_normal((num_clusters, hidden_size)).astype(np.float32)
    bias = draw.standard_normal(num_clusters).astype(np.float32)
    return ResidualArtifact(rows / np.linalg.norm(rows, axis=1, keepdims=True), weights, bias)


def residual_program(*edits: ResidualEdit) -> SteeringProgram:
    return SteeringProgram(residual_edits=edits, applied=(AppliedMethod("drawn", {}),))


class Added:
    """The edits of one program on a transformers model; `picked` are the clusters of all rows."""

    def __init__(
        self,
        artifacts: Sequence[ResidualArtifact],
        edits: Sequence[ResidualEdit],
        prompt_len: int,
    ) -> None:
        self.artifacts = {artifact.digest: artifact for artifact in artifacts}
        self.edits, self.prompt_len = edits, prompt_len
        self.picked: set[int] = set()

    def _edit(self, stream: torch.Tensor, edit: ResidualEdit) -> torch.Tensor:
        artifact = self.artifacts[edit.artifact]
        first = 0 if edit.scope is QueryScope.ALL else self.prompt_len - 1
        changed = stream.clone()
        for row in range(first, len(stream)):
            x = stream[row]
            rms = torch.sqrt((x * x).mean())
            probe = torch.tensor(artifact.probe_weights) @ x / rms
            scores = probe + torch.tensor(artifact.probe_bias)
            cluster = int(scores.argmax()) if edit.cluster is None else edit.cluster
            self.picked.add(cluster)
            changed[row] = x + edit.strength * rms * torch.tensor(artifact.directions[cluster])
        return changed

    @contextmanager
    def on(self, layers: Sequence[torch.nn.Module]) -> Any:
        """Edit what enters the decoder layers of a model, for one sequence at a time."""
        handles = []
        for edit in self.edits:

            def change(module: Any, args: tuple, kwargs: dict, edit: ResidualEdit = edit) -> Any:
                assert args[0].shape[0] == 1
                return (self._edit(args[0][0], edit)[None], *args[1:]), kwargs

            layer = layers[edit.layer]
            handles.append(layer.register_forward_pre_hook(change, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
