"""What the image changes in the attention heads of a transformers model.

The output z of a head is its slice of the input of the attention's output projection, here at the
last position of the prompt. Each prompt is run twice, unedited: with its image and, as in VHR
(arXiv 2412.13949), without the image tokens.

transformers symbols relied on: `AutoModelForImageTextToText`, `AutoProcessor`,
`ProcessorMixin.apply_chat_template`, `PreTrainedConfig.image_token_id`, and the module `o_proj` of
a decoder layer's `self_attn`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from headway.kernels.head_selection import head_divergence
from headway.server.calibration.pictures import Asked
from headway.server.calibration.residual import decoder_layers

Inputs = dict[str, torch.Tensor]
"""What a processor makes of one prompt; what belongs to its tokens is [1, num_tokens]."""


def load_image_model(name: str) -> tuple[Any, Any]:
    """A model in float32 on the CPU, with eager attention, and its processor.

    name: a directory or a name on the model hub. Raises ValueError for a class whose image cannot
    be left out and for weights that are not in the checkpoint, and what transformers raises
    (OSError, ValueError) for a model it does not know.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, loaded = AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ValueError(f"{name}: {len(missing)} weights are missing, such as {missing[0]}")
    check_class(model)
    return model.eval(), AutoProcessor.from_pretrained(name)


def check_class(model: Any) -> None:
    """Raise ValueError for a class that cannot be run without an image, or that hides its heads."""
    name = type(model).__name__
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    if pixels is None or pixels.default is inspect.Parameter.empty:
        raise ValueError(f"{name} takes no prompt without an image to compare with")
    if getattr(model.config, "image_token_id", None) is None:
        raise ValueError(f"{name}: its configuration names no image token")
    output_projections(model)


def output_projections(model: Any) -> list[torch.nn.Linear]:
    """The attention's output projection in each decoder layer, in order. Raises ValueError."""
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        projection = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if not isinstance(projection, torch.nn.Linear):
            name = type(model).__name__
            raise ValueError(f"{name}: layer {index} has no output projection self_attn.o_proj")
        found.append(projection)
    return found


def mean_divergence(
    model: Any, processor: Any, asked: Iterable[Asked], total: int, num_heads: int
) -> torch.Tensor:
    """VHD of every head, outliers set to zero, averaged over prompts.

    total: how many prompts `asked` holds. Returns float32 [num_layers, num_heads].
    Raises ValueError for a prompt whose image does not enter by one run of image tokens.
    """
    image_token = model.config.image_token_id
    texts: dict[tuple[int, ...], torch.Tensor] = {}
    found = []
    for image, question in tqdm(asked, desc="head outputs", unit="prompt", total=total):
        inputs = prompt_inputs(processor, image, question)
        text = without_image(inputs, image_token)
        key = tuple(text["input_ids"][0].tolist())
        if key not in texts:
            texts[key] = head_outputs(model, text, num_heads)
        outputs = head_outputs(model, inputs, num_heads)
        layers = zip(outputs, texts[key], strict=True)
        found.append(torch.stack([head_divergence(z, z_text) for z, z_text in layers]))
    return torch.stack(found).mean(dim=0)


def prompt_inputs(processor: Any, image: Any, question: str) -> Inputs:
    """A user's message of an image and a question, ready to be answered.

    Raises ValueError for a processor without a chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError("the model's processor has no chat template to write a prompt with")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs)


def without_image(inputs: Inputs, image_token: int) -> Inputs:
    """The same prompt without its image and image tokens; tokens around these stay.

    Raises ValueError where the image is not one run of image tokens.
    """
    tokens = inputs["input_ids"]
    is_image = tokens[0] == image_token
    places = is_image.nonzero().flatten().tolist()
    if not places:
        raise ValueError(f"the prompt of an image holds no image token {image_token}")
    if places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            "other tokens stand between the image tokens of one image (as for tiles or rows), so "
            "that a prompt without the image is more than one without its image tokens"
        )
    return {
        name: value[:, ~is_image] for name, value in inputs.items() if value.shape == tokens.shape
    }


def head_outputs(model: Any, inputs: Inputs, num_heads: int) -> torch.Tensor:
    """z of every head at the last position: float32 [num_layers, num_heads, head_size].

    Raises ValueError if the layers do not see one position per token.
    """
    projections = output_projections(model)
    entering: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), _observed(projections, entering):
        model(**inputs, use_cache=False)
    num_tokens = inputs["input_ids"].shape[1]
    for layer, output in sorted(entering.items()):
        if output.shape[0] != num_tokens:
            raise ValueError(
                f"{type(model).__name__}: layer {layer} sees {output.shape[0]} positions of "
                f"{num_tokens} tokens, so the image does not enter by its tokens alone"
            )
    last = torch.stack([entering[layer][-1] for layer in range(len(projections))])
    return last.float().unflatten(-1, (num_heads, -1))


@contextmanager
def _observed(
    projections: Sequence[torch.nn.Linear], entering: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Put into `entering` what enters each output projection: [num_tokens, num_heads * size]."""

    def observe(layer: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            entering[layer] = args[0][0].clone()

        return hook

    handles = [
        projection.register_forward_pre_hook(observe(layer))
        for layer, projection in enumerate(projections)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
