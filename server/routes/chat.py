"""POST /v1/chat/completions."""

import asyncio

from fastapi import APIRouter, Request, Response

from anybit.server.answering import EncodedPrompt, Endpoint, answer
from anybit.server.openapi import generation_route
from anybit.server.protocol.chat import ChatMessage, ChatRequest, ChatResponse
from anybit.server.service import LoadedModel
from anybit.server.streaming import ChatShape

router = APIRouter()

# Shorter conversations are rendered faster than a thread is reached.
_INLINE_CHARACTERS = 8192


async def render(messages: list[ChatMessage], model: LoadedModel) -> str:
    """The conversation as the model reads it, up to where its answer begins."""
    forms = [message.template_form for message in messages]
    if sum(len(form["content"]) for form in forms) <= _INLINE_CHARACTERS:
        return model.chat_template.render(forms)
    return await asyncio.to_thread(model.chat_template.render, forms)


async def encode_messages(body: ChatRequest, model: LoadedModel) -> list[EncodedPrompt]:
    """Token ids of the rendered conversation; the template itself writes the special tokens."""
    text = await render(body.messages, model)
    token_ids = await model.tokenizer.encode(
        text, add_special_tokens=False, max_tokens=model.info.max_model_len, param="messages"
    )
    return [EncodedPrompt(token_ids)]


_ENDPOINT = Endpoint(
    body=ChatRequest,
    encode=encode_messages,
    shape=ChatShape,
    id_prefix="chatcmpl",
    operation="chat",
    default_max_tokens=None,
    prompt_field="messages",
)


@router.post("/v1/chat/completions", **generation_route(ChatRequest, ChatResponse))
async def create_chat_completion(request: Request) -> Response:
    """Answer the last message of a conversation."""
    return await answer(request, _ENDPOINT)
