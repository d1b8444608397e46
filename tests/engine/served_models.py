"""A tiny image model in the engine and in transformers, and questions about pictures for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headway.steering import SteeringProgram
from tests.attention_oracle import AttentionOracle, Scale, Var
from tests.engine.harness import Harness, Job, largest_difference, program
from tests.tiny_models.base import FIRST_TOKEN, SINK_DIMS, TinyModel
from tests.vhr_oracle import LayerChoice, choose

MAX_TOKENS = 6

# {0} and {1}: the first and the second kind of picture.
TEXTS = ["{0}What is on this picture?", "Compare {1} and then{0}. Which one is brighter?"]
VHR_HEADS = [[0, 1], [2, 3]]
VAR_LAYERS = [1, 2]
RHO = 0.3
ALPHA = 1.7


class Question:
    """A prompt with pictures, as the engine takes it and as transformers' processor expands it."""

    def __init__(self, model: TinyModel, processor: Any, index: int) -> None:
        short, text = (
            self._text(index, model.around, token)
            for token in (model.picture_token, model.processor_token or model.picture_token)
        )
        self.kinds = [0] if index == 0 else [1, 0]
        self.model = model
        self.pictures = [model.picture(kind, 10 * index + kind) for kind in self.kinds]
        self.short: list[int] = processor.tokenizer(short)["input_ids"]
        self.inputs = processor(images=self.pictures, text=text, return_tensors="pt")
        self.ids: list[int] = self.inputs["input_ids"][0].tolist()
        assert self.ids[0] == FIRST_TOKEN

    @staticmethod
    def _text(index: int, around: tuple[str, str], picture_token: str) -> str:
        place = around[0] + picture_token + around[1]
        text = TEXTS[index].format(place, place)
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def job(self, steered: SteeringProgram | None = None) -> Job:
        return Job(self.short, steered, MAX_TOKENS, images=self.pictures)

    def image_mask(self, further: int) -> torch.Tensor:
        """bool [prompt + further]: tokens that stand for image embeddings."""
        embedding = [token == self.model.embedding_id for token in self.ids]
        return torch.tensor(embedding + [False] * further)

    def oracle_inputs(self, further: int) -> dict[str, Any]:
        """What transformers' model takes beside the tokens of prompt and output."""
        inputs = {key: self.inputs[key] for key in self.model.pixel_inputs}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = self.image_mask(further)[None].int()
        return inputs

    def var(self) -> Var:
        mask, tau = self.image_mask(MAX_TOKENS - 1), self.model.tau
        return Var(mask, len(self.ids), SINK_DIMS, VAR_LAYERS, rho=RHO, tau=tau)


class Served:
    """An engine with a tiny model, and the same weights in transformers."""

    def __init__(self, model: TinyModel, harness: Harness, folder: Path, reference: Any) -> None:
        self.model = model
        self.harness = harness
        processor = model.processor(folder)
        self.questions = [Question(model, processor, index) for index in range(len(TEXTS))]
        self.reference = [self._generate(reference, question) for question in self.questions]
        self.oracle = AttentionOracle(reference)

    def _generate(self, reference: Any, question: Question) -> list[int]:
        """Greedy tokens of transformers' own generation loop and attention."""
        options = {"max_new_tokens": MAX_TOKENS, "min_new_tokens": MAX_TOKENS, "do_sample": False}
        output = reference.generate(**question.inputs, **options)
        return output[0, len(question.ids) :].tolist()

    def program(self, *methods: dict[str, Any]) -> SteeringProgram:
        return program(*methods, geometry=self.model.geometry)

    def vhr(self, alpha: float = ALPHA) -> dict[str, Any]:
        return {"method": "vhr", "heads": VHR_HEADS, "alpha": alpha}

    def var(self, p: float = 0.6) -> dict[str, Any]:
        sinks = {"sink_dims": SINK_DIMS, "tau": self.model.tau}
        return {"method": "var", **sinks, "layers": VAR_LAYERS, "rho": RHO, "p": p}

    def difference(self, jobs: list[Job], edits: list[Any], asked: list[Question]) -> float:
        """Largest difference of a logit from transformers', over the output tokens of a batch."""
        return largest_difference(
            self.harness,
            self.oracle,
            jobs,
            edits,
            prompts=[question.ids for question in asked],
            inputs=[question.oracle_inputs(MAX_TOKENS - 1) for question in asked],
        )

    def choices(self, question: Question, layers: list[int]) -> list[LayerChoice]:
        """What VHR's rule chooses at each of the layers, those below being scaled."""
        text = [token for token in question.ids if token != self.model.embedding_id]
        alone = self._head_outputs(text)
        heads: set[tuple[int, int]] = set()
        choices = []
        for layer in layers:
            z = self._head_outputs(question.ids, [Scale(heads, ALPHA)], **question.oracle_inputs(0))
            choices.append(choose(z[layer], alone[layer]))
            heads |= {(layer, head) for head in choices[-1].heads}
        return choices

    def _head_outputs(self, ids: list[int], edits: Any = (), **inputs: Any) -> list[torch.Tensor]:
        """z of every layer at the last position, [heads, head size]."""
        found: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args: found.append(args[0][0, -1].clone())
            )
            for layer in self.oracle.decoder.layers
        ]
        try:
            self.oracle.logits(ids, edits, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [z.view(self.model.geometry.num_heads, -1) for z in found]
