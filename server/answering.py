"""The way of a generating request, the same for completions and chat: body, width, queue, tokens, sequences."""

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from anybit.server.body import read_body
from anybit.server.errors import APIError
from anybit.server.generation import Generation
from anybit.server.middleware import request_info
from anybit.server.planning import SequencePlanner
from anybit.server.precision_request import BIT_WIDTH_HEADER, KV_FORMAT_HEADER, choose_model
from anybit.server.protocol.common import GenerationFields
from anybit.server.request_record import RequestOrigin
from anybit.server.service import LoadedModel, service_of
from anybit.server.streaming import AnswerHead, AnswerShape, GenerationResponse, StreamSettings
from anybit.server.token_text import TokenTexts
from anybit.server.version import system_fingerprint

Body = TypeVar("Body", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the engine sees it, and the text that an answer puts before its own."""

    token_ids: list[int]
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[Body]):
    """What tells one generating endpoint from another."""

    body: type[Body]
    encode: Callable[[Body, LoadedModel], Awaitable[list[EncodedPrompt]]]
    shape: Callable[[TokenTexts], AnswerShape]
    id_prefix: str
    operation: str  # as traces call it
    default_max_tokens: int | None  # None: all that fits into the context
    prompt_field: str


async def answer(request: Request, endpoint: Endpoint[Body]) -> Response:
    """Check and queue the request; the response then runs it. Raises APIError."""
    service = service_of(request)
    info = request_info(request.scope)
    try:
        model = service.require_model()
        body = await read_body(request, endpoint.body)
        choice = choose_model(body, request.headers, service.config.model_name, model.info)
        info.set_response_header(BIT_WIDTH_HEADER, choice.precision.label)
        info.set_response_header(KV_FORMAT_HEADER, choice.kv_format)
        # The client's own request id may repeat, so the engine never sees it.
        unique_id = uuid.uuid4().hex
        ticket = service.admission.enter(body.num_sequences)
        try:
            prompts = await endpoint.encode(body, model)
            planner = SequencePlanner(
                model.info, model.tokenizer.eos_token_ids, endpoint.default_max_tokens, endpoint.prompt_field
            )
            sequences = planner.plan(body, [prompt.token_ids for prompt in prompts], choice, unique_id)
            ticket.add_tokens([len(sequence.prompt_token_ids) for sequence in sequences])
        except BaseException:
            ticket.release()
            raise
    except APIError as error:
        if error.reason is not None:
            service.metrics.count_rejection(error.reason)
        raise
    generation = Generation(
        origin=RequestOrigin(info.id, endpoint.operation, choice.name, info.arrival, _trace_headers(request)),
        deadline=info.arrival + service.config.request_timeout_seconds,
        engine=service.engine,
        tokenizer=model.tokenizer,
        requests=sequences,
        stop=body.stop,
        num_choices=body.num_choices,
        echoes=[prompt.echo for prompt in prompts],
        metrics=service.metrics.width(choice.precision.label),
        ticket=ticket,
        observers=service.observers,
        live_quality=service.live_quality,
    )
    head = AnswerHead(
        id=f"{endpoint.id_prefix}-{unique_id}",
        created=int(time.time()),
        model=choice.name,
        system_fingerprint=system_fingerprint(choice.precision),
        bit_width=choice.precision.bit_width,
    )
    shape = endpoint.shape(model.tokenizer.texts)
    return GenerationResponse(generation, head, shape, _stream_settings(body), service.metrics.count_rejection)


def _trace_headers(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}


def _stream_settings(body: GenerationFields) -> StreamSettings | None:
    if not body.stream:
        return None
    options = body.stream_options
    if options is None:
        return StreamSettings(include_usage=False, continuous_usage=False)
    return StreamSettings(bool(options.include_usage), bool(options.continuous_usage_stats))
