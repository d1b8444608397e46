"""Residual edits for tests: drawn artefacts, programs with them, the formula on HF models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from headway.steering.artifacts import ResidualArtifact
from headway.steering.program import (
    AppliedMethod,
    QueryScope,
    ResidualEdit,
    ResidualForm,
    ResidualSite,
    SteeringProgram,
)


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
    """The edits of one program on a transformers model.

    picked: the clusters of all rows. read: point -> x / rms(x) at the last prompt position, as the
    probe saw it, and the cluster that it picked.
    """

    def __init__(
        self,
        artifacts: Sequence[ResidualArtifact],
        edits: Sequence[ResidualEdit],
        prompt_len: int,
    ) -> None:
        self.artifacts = {artifact.digest: artifact for artifact in artifacts}
        self.edits, self.prompt_len = edits, prompt_len
        self.picked: set[int] = set()
        self.read: dict[int, tuple[torch.Tensor, int]] = {}

    def _edit(self, stream: torch.Tensor, edit: ResidualEdit) -> torch.Tensor:
        """What the edit makes of the stream of one sequence, [num_tokens, hidden_size]."""
        artifact = self.artifacts[edit.artifact]
        first = {
            QueryScope.ALL: 0,
            QueryScope.OUTPUT: self.prompt_len,
            QueryScope.FROM_LAST_PROMPT_TOKEN: self.prompt_len - 1,
        }[edit.scope]
        changed = stream.clone()
        for row in range(first, len(stream)):
            x = stream[row]
            rms = torch.sqrt((x * x).mean())
            probe = torch.tensor(artifact.probe_weights) @ x / rms
            scores = probe + torch.tensor(artifact.probe_bias)
            cluster = int(scores.argmax()) if edit.cluster is None else edit.cluster
            self.picked.add(cluster)
            if row == self.prompt_len - 1:
                self.read[edit.point] = x / rms, int(scores.argmax())
            v = torch.tensor(artifact.directions[cluster])
            if edit.form is ResidualForm.RMS:
                changed[row] = x + edit.strength * rms * v
            elif edit.form is ResidualForm.ADD:
                changed[row] = x + edit.strength * v
            else:
                unit = v / v.norm()
                changed[row] = x - edit.strength * (x @ unit) * unit
        return changed

    @contextmanager
    def on(self, layers: Sequence[torch.nn.Module]) -> Any:
        """Edit the decoder layers of a model as they run, for one sequence at a time."""
        handles = []
        for edit in self.edits:
            layer = layers[edit.layer]
            if edit.site is ResidualSite.BLOCK_INPUT:
                handles.append(layer.register_forward_pre_hook(self._before(edit)))
            elif edit.site is ResidualSite.BLOCK_OUTPUT:
                handles.append(layer.register_forward_hook(self._behind(edit)))
            else:
                handles += self._after_attention(layer, edit)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, edit: ResidualEdit) -> Any:
        def change(module: Any, args: tuple) -> tuple:
            assert args[0].shape[0] == 1
            return (self._edit(args[0][0], edit)[None], *args[1:])

        return change

    def _behind(self, edit: ResidualEdit) -> Any:
        def change(module: Any, args: tuple, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            edited = self._edit(stream[0], edit)[None]
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return change

    def _after_attention(self, layer: Any, edit: ResidualEdit) -> list[Any]:
        """The layer adds what attention gives to its input: that gives the difference as well."""
        entered: list[torch.Tensor] = []

        def remember(module: Any, args: tuple) -> None:
            entered[:] = [args[0][0]]

        def change(module: Any, args: tuple, kwargs: dict, output: tuple) -> tuple:
            given = output[0][0]
            stream = entered[0] + given
            return ((given + self._edit(stream, edit) - stream)[None], *output[1:])

        return [
            layer.input_layernorm.register_forward_pre_hook(remember),
            layer.self_attn.register_forward_hook(change, with_kwargs=True),
        ]
