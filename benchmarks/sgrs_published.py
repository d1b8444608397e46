"""SGRS as it was published, with the right row: what Headway's own computation is measured against.

The released code of Saliency-Guided Rejection Sampling (arXiv 2601.20279) runs a whole forward pass
without a cache, and a backward pass, for every candidate that is drawn. It reads the saliency at
the candidate's own row, where it is zero; here the row is the one that the candidate is drawn from.
Otherwise this is that procedure on transformers' eager attention, where nothing is computed that
the saliency does not need: no gradients of parameters, none below the lowest target layer, and
the logits of one row.

It is timed in a process of its own (`PublishedProcess`), whose malloc is set as that of the server:
glibc reads that at the start of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headway.benchmarks.engine import KEEP_MEMORY, EngineError, ask, end


class Published:
    """A transformers model with frozen parameters, and what it takes to judge one candidate."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path, dtype: str) -> Published:
        """The model of a checkpoint, on CPU. dtype: the name of torch's."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return cls(
            AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
        )

    def saliency(
        self, context: Sequence[int], candidate: int, layers: Sequence[int], prompt_len: int
    ) -> float:
        """S of a candidate for the token after `context`: with the last row of each target layer

            S_l[j] = sum_h | A[h, j] * dL/dA[h, j] |,    L = -log p(candidate),

        divided by its L2 norm over all keys, the mean over layers and output positions j.

        prompt_len: from this position on, tokens of the context are output; at least one is.
        """
        if not 0 <= prompt_len < len(context):
            raise ValueError(f"no history: {len(context)} tokens, {prompt_len} of them the prompt")
        # With frozen parameters no graph is made unless it starts at an input.
        embeddings = self.model.get_input_embeddings()(torch.tensor([list(context)]))
        output = self.model(
            inputs_embeds=embeddings.requires_grad_(),
            use_cache=False,
            output_attentions=True,
            logits_to_keep=1,
        )
        loss = -torch.log_softmax(output.logits[0, -1].float(), dim=-1)[candidate]
        targets = [output.attentions[layer] for layer in layers]
        gradients = torch.autograd.grad(loss, targets)
        values = []
        for weights, gradient in zip(targets, gradients, strict=True):
            row = weights.detach()[0, :, -1].float() * gradient[0, :, -1].float()
            row = row.abs().sum(dim=0)
            norm = row.norm()
            values.append(row[prompt_len:].mean() / norm if norm > 0 else norm)
        return float(torch.stack(values).mean())

    def timed(
        self, context: Sequence[int], candidate: int, layers: Sequence[int], prompt_len: int
    ) -> tuple[float, float]:
        """`saliency`, and the seconds that it took."""
        started = time.perf_counter()
        value = self.saliency(context, candidate, layers, prompt_len)
        return value, time.perf_counter() - started


class PublishedProcess:
    """A `Published` in a process of its own, which loads the model once it is made. `close` it."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headway.benchmarks.sgrs_published", str(path), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **KEEP_MEMORY},
            text=True,
        )

    def timed(
        self, context: Sequence[int], candidate: int, layers: Sequence[int], prompt_len: int
    ) -> tuple[float, float]:
        """See `Published.timed`. Raises EngineError if the process has ended."""
        asked = list(context), candidate, list(layers), prompt_len
        line = ask(self.process, json.dumps(asked))
        if not line:
            raise EngineError("the process of the published procedure ended")
        saliency, seconds = json.loads(line)
        return saliency, seconds

    def close(self) -> None:
        """End the process."""
        end(self.process)


def main(path: str, dtype: str) -> None:
    """Judge what comes on stdin, a line each, until that ends. Whatever libraries print goes to
    stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    published = Published.load(Path(path), dtype)
    for line in sys.stdin:
        print(json.dumps(published.timed(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
