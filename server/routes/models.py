"""GET /v1/models: the served model, and one alias per bit-width for clients that can send nothing but a name."""

from typing import Literal

from fastapi import APIRouter, Request

from anybit.engine.types import ModelInfo, WidthInfo
from anybit.server.errors import ModelNotFoundError, shorten
from anybit.server.openapi import error_responses
from anybit.server.precision_request import model_alias
from anybit.server.protocol.common import ModelCard, ModelList, Preparing
from anybit.server.service import Service, service_of

router = APIRouter()

_ID_PARAMETER = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}


@router.get("/v1/models", response_model=ModelList, responses=error_responses(401, 503))
async def list_models(request: Request) -> ModelList:
    """All names under which the model answers."""
    return ModelList(object="list", data=_cards(service_of(request)))


# The id is read by hand, because a name may hold slashes and a declared parameter would promise status 422.
@router.get(
    "/v1/models/{model_id:path}",
    response_model=ModelCard,
    responses=error_responses(401, 404, 503),
    openapi_extra={"parameters": [_ID_PARAMETER]},
)
async def show_model(request: Request) -> ModelCard:
    """One of these names."""
    model_id: str = request.path_params["model_id"]
    for card in _cards(service_of(request)):
        if card.id == model_id:
            return card
    raise ModelNotFoundError(f"The model '{shorten(model_id)}' is not served here; see /v1/models.", param="model")


def _cards(service: Service) -> list[ModelCard]:
    model = service.require_model().info
    name = service.config.model_name
    default = next(width for width in model.widths if width.bit_width == model.default_bit_width)
    named = [(name, default), *((model_alias(name, width.bit_width), width) for width in model.widths)]
    preparing = _preparing(service)
    return [_card(alias, width, model, service.created, preparing) for alias, width in named]


def _preparing(service: Service) -> Preparing | None:
    status = None if service.upgrade is None else service.upgrade.status
    return None if status is None else Preparing(method=status.method, stage=status.stage, progress=status.share)


def _card(name: str, width: WidthInfo, model: ModelInfo, created: int, preparing: Preparing | None) -> ModelCard:
    kind: Literal["model"] = "model"
    return ModelCard(
        id=name,
        object=kind,
        created=created,
        owned_by="anybit",
        bit_width=width.bit_width,
        effective_bits=width.effective_bits,
        max_model_len=model.max_model_len,
        bytes_read_per_token=width.bytes_read_per_token,
        method=model.method,
        preparing=preparing,
    )
