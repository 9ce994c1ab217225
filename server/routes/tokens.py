"""POST /tokenize and /detokenize: text and token ids of the served model."""

from fastapi import APIRouter, Request

from anybit.server.body import read_body
from anybit.server.errors import InvalidRequestError
from anybit.server.openapi import body_route
from anybit.server.precision_request import check_model_name
from anybit.server.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from anybit.server.routes.chat import render
from anybit.server.service import service_of

router = APIRouter()


@router.post("/tokenize", **body_route(TokenizeRequest, TokenizeResponse))
async def tokenize(request: Request) -> TokenizeResponse:
    """The token ids of a text, or of a conversation as /v1/chat/completions would send it to the model."""
    service = service_of(request)
    model = service.require_model()
    body = await read_body(request, TokenizeRequest)
    check_model_name(body.model, service.config.model_name, model.info)
    limit = service.config.max_body_bytes  # no text of an accepted body is refused for its length
    if body.messages is not None:
        text = await render(body.messages, model)
        tokens = await model.tokenizer.encode(text, add_special_tokens=False, max_tokens=limit, param="messages")
    else:
        tokens = await model.tokenizer.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False, max_tokens=limit, param="prompt"
        )
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=model.info.max_model_len)


@router.post("/detokenize", **body_route(DetokenizeRequest, DetokenizeResponse))
async def detokenize(request: Request) -> DetokenizeResponse:
    """The text of token ids, special tokens written out."""
    service = service_of(request)
    model = service.require_model()
    body = await read_body(request, DetokenizeRequest)
    check_model_name(body.model, service.config.model_name, model.info)
    unknown = [token_id for token_id in body.tokens if token_id >= model.info.vocab_size]
    if unknown:
        message = f"tokens holds the id {unknown[0]}, but the model knows ids below {model.info.vocab_size}."
        raise InvalidRequestError(message, param="tokens")
    return DetokenizeResponse(prompt=await model.tokenizer.decode(body.tokens))
