"""From a checked request and its token ids to the sequences that the engine is asked for."""

import secrets
from dataclasses import dataclass

from anybit.engine.types import GenerationRequest, ModelInfo, SamplingParams
from anybit.server.errors import ContextLengthError, InvalidRequestError
from anybit.server.precision_request import ModelChoice
from anybit.server.protocol.common import GenerationFields

# Below this a temperature cannot be told from greedy choice, and dividing by it would leave the range of floats.
_MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class SequencePlanner:
    """What all requests to one endpoint of one model have in common."""

    model: ModelInfo
    eos_token_ids: frozenset[int]  # the tokenizer's, beside the model's own
    default_max_tokens: int | None  # None: all that fits into the context
    prompt_field: str  # what an error about the prompt names

    def plan(
        self, body: GenerationFields, prompts: list[list[int]], choice: ModelChoice, id_prefix: str
    ) -> list[GenerationRequest]:
        """One sequence per prompt and choice, prompt by prompt.

        Raises ContextLengthError and InvalidRequestError when a prompt cannot be served.
        """
        unknown = [token_id for token_id in body.logit_bias if token_id >= self.model.vocab_size]
        if unknown:
            message = f"logit_bias names token id {unknown[0]}, but the model knows ids below {self.model.vocab_size}."
            raise InvalidRequestError(message, param="logit_bias")
        limits = [self._token_limit(body.token_limit, prompt) for prompt in prompts]
        stop_token_ids = () if body.ignore_eos else tuple(sorted(self.eos_token_ids.union(self.model.eos_token_ids)))
        sequences: list[GenerationRequest] = []
        for prompt, max_tokens in zip(prompts, limits, strict=True):
            for number in range(body.num_choices):
                sampling = SamplingParams(
                    max_tokens=max_tokens,
                    temperature=_temperature(body.temperature),
                    top_p=1.0 if body.top_p is None else body.top_p,
                    top_k=min(max(body.top_k or 0, 0), self.model.vocab_size),
                    min_p=body.min_p or 0.0,
                    presence_penalty=body.presence_penalty or 0.0,
                    frequency_penalty=body.frequency_penalty or 0.0,
                    repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
                    logit_bias=body.logit_bias,
                    seed=_seed(body.seed, number),
                    stop_token_ids=stop_token_ids,
                    num_logprobs=body.num_logprobs,
                    num_prompt_logprobs=body.num_prompt_logprobs,
                )
                request_id = f"{id_prefix}-{len(sequences)}"
                sequences.append(
                    GenerationRequest(
                        request_id, prompt, sampling, choice.precision, body.cache_salt or "", choice.kv_format
                    )
                )
        return sequences

    def _token_limit(self, asked: int | None, prompt: list[int]) -> int:
        model, param = self.model, self.prompt_field
        if not prompt:
            raise InvalidRequestError("The prompt has no tokens; send at least one.", param=param)
        if max(prompt) >= model.vocab_size:
            message = f"The prompt holds token id {max(prompt)}, but the model knows ids below {model.vocab_size}."
            raise InvalidRequestError(message, param=param)
        room = model.max_model_len - len(prompt)
        if room < (1 if asked is None else min(asked, 1)):
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens, but the context holds {model.max_model_len} "
                "and at least one must stay free; shorten the prompt.",
                param=param,
            )
        if asked is None:
            return room if self.default_max_tokens is None else min(self.default_max_tokens, room)
        if asked > room:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and max_tokens asks for {asked} more, but the context holds "
                f"{model.max_model_len}; ask for at most {room}.",
                param="max_tokens",
            )
        return asked


def _temperature(asked: float | None) -> float:
    if asked is None:
        return 1.0
    return asked if asked >= _MIN_TEMPERATURE else 0.0


def _seed(asked: int | None, choice: int) -> int:
    """The seed of a prompt's `choice`: the same alone and among other prompts, and always a signed 64-bit number."""
    seed = secrets.randbits(64) if asked is None else asked + choice
    return (seed + 2**63) % 2**64 - 2**63
