"""GET /v1/models with a card for every preset of every base model.

vLLM symbols relied on: `OpenAIServingModels.show_available_models`, `ModelCard`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ModelCard

from headway.server.http.state import steering_state

router = APIRouter()


@router.get("/v1/models")
async def show_available_models(raw_request: Request) -> JSONResponse:
    """vLLM's list, then `<base>:<preset>` cards whose parent is the base model."""
    state = steering_state(raw_request)
    listed = await state.models.show_available_models()
    bases = [card for card in listed.data if state.models.is_base_model(card.id)]
    listed.data.extend(
        ModelCard(
            id=f"{base.id}:{preset}",
            created=base.created,
            root=base.root,
            parent=base.id,
            max_model_len=base.max_model_len,
            permission=base.permission,
        )
        for base in bases
        for preset in state.presets
    )
    return JSONResponse(listed.model_dump())
