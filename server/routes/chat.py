"""POST /v1/chat/completions."""

import asyncio

from fastapi import APIRouter, Request, Response

from anybit.server.answering import Endpoint, answer
from anybit.server.openapi import generation_route
from anybit.server.protocol.chat import ChatRequest, ChatResponse
from anybit.server.service import LoadedModel
from anybit.server.streaming import ChatShape

router = APIRouter()

# Shorter conversations are rendered faster than a thread is reached.
_INLINE_CHARACTERS = 8192


async def encode_messages(body: ChatRequest, model: LoadedModel) -> list[list[int]]:
    """Token ids of the rendered conversation; the template itself writes the special tokens."""
    messages = [message.template_form for message in body.messages]
    if sum(len(message["content"]) for message in messages) <= _INLINE_CHARACTERS:
        text = model.chat_template.render(messages)
    else:
        text = await asyncio.to_thread(model.chat_template.render, messages)
    return [
        await model.tokenizer.encode(
            text, add_special_tokens=False, max_tokens=model.info.max_model_len, param="messages"
        )
    ]


_ENDPOINT = Endpoint(
    body=ChatRequest,
    encode=encode_messages,
    shape=ChatShape,
    id_prefix="chatcmpl",
    default_max_tokens=None,
    prompt_field="messages",
)


@router.post("/v1/chat/completions", **generation_route(ChatRequest, ChatResponse))
async def create_chat_completion(request: Request) -> Response:
    """Answer the last message of a conversation."""
    return await answer(request, _ENDPOINT)
