"""What operators ask: /health, /ready, /version and /metrics."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from anybit.engine.types import EngineState
from anybit.server.metrics.exposition import CONTENT_TYPE
from anybit.server.openapi import error_responses
from anybit.server.protocol.common import Status, VersionInfo
from anybit.server.service import service_of
from anybit.server.version import anybit_version

router = APIRouter()

OPEN_PATHS = frozenset({"/health", "/ready"})  # what asks these holds no key

_UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "Not now."}}


@router.get("/health", response_model=Status, responses=_UNHEALTHY)
async def health(request: Request) -> JSONResponse:
    """Whether the process and its engine are alive; a restart is the cure when they are not."""
    state = service_of(request).health.state
    status = 503 if state in (EngineState.LOST, EngineState.STALLED) else 200
    return JSONResponse({"status": "ok" if state is EngineState.READY else state.value}, status)


@router.get("/ready", response_model=Status, responses=_UNHEALTHY)
async def ready(request: Request) -> JSONResponse:
    """Whether a request sent now would be let in."""
    service = service_of(request)
    if service.ready:
        return JSONResponse({"status": "ready"})
    state = service.health.state
    return JSONResponse({"status": "busy" if state is EngineState.READY else state.value}, 503)


@router.get("/version", response_model=VersionInfo, responses=error_responses(401))
async def version(request: Request) -> VersionInfo:
    """What runs here; the model's part is empty while it loads."""
    service = service_of(request)
    model = service.engine.model
    return VersionInfo(
        version=anybit_version(),
        model=service.config.model_name,
        method=None if model is None else model.method,
        reproducible=None if model is None else model.reproducible,
        bit_widths=[] if model is None else model.bit_widths,
        default_bit_width=None if model is None else model.default_bit_width,
        kv_format=None if model is None else model.kv_format,
        kv_formats=[] if model is None else [kv.name for kv in model.kv_formats],
        kv_layers_raised={}
        if model is None
        else {kv.name: kv.raised_layers for kv in model.kv_formats if kv.raised_layers},
        device=None if model is None else model.device,
        compute_dtype=None if model is None else model.compute_dtype,
    )


@router.get("/metrics", response_class=Response, responses=error_responses(401))
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    return Response(service_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})
