"""POST /v1/completions."""

import asyncio

from fastapi import APIRouter, Request, Response

from anybit.server.answering import EncodedPrompt, Endpoint, answer
from anybit.server.openapi import generation_route
from anybit.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest, CompletionResponse
from anybit.server.service import LoadedModel
from anybit.server.streaming import CompletionShape

router = APIRouter()


async def encode_prompts(body: CompletionRequest, model: LoadedModel) -> list[EncodedPrompt]:
    """Token ids of all prompts; ids that the client sent stay as they are, with no BOS added."""

    async def encode(prompt: str | list[int]) -> EncodedPrompt:
        if isinstance(prompt, list):
            return EncodedPrompt(prompt, await model.tokenizer.decode(prompt) if body.echo else "")
        token_ids = await model.tokenizer.encode(
            prompt, add_special_tokens=True, max_tokens=model.info.max_model_len, param="prompt"
        )
        return EncodedPrompt(token_ids, prompt if body.echo else "")

    return await asyncio.gather(*map(encode, body.prompt))


_ENDPOINT = Endpoint(
    body=CompletionRequest,
    encode=encode_prompts,
    shape=CompletionShape,
    id_prefix="cmpl",
    operation="text_completion",
    default_max_tokens=DEFAULT_MAX_TOKENS,
    prompt_field="prompt",
)


@router.post("/v1/completions", **generation_route(CompletionRequest, CompletionResponse))
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    return await answer(request, _ENDPOINT)
