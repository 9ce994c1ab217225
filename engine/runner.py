"""Executes one step on the device: plan, forward pass, log probabilities, sampling."""

from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.engine.batch import BatchPlan, plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.decode_graphs import DecodeGraphs, LaunchedDecode
from anybit.engine.logprobs import score_rows, token_logprobs
from anybit.engine.models.decoder import Decoder
from anybit.engine.penalties import adjust_logits, changes_logits
from anybit.engine.sampling import UNDECIDED, FoundTokens, is_drawn, sample
from anybit.engine.sequence import Sequence
from anybit.engine.step_inputs import StepShape
from anybit.engine.types import SamplingParams, TokenLogprob
from anybit.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a sequence, or None where its logits were not finite."""

    sequence: Sequence
    token_id: int | None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step found out: tokens of the sequences that can go on, scores of prompts that asked for them.

    `in_one_pass` says that its widths read the weights together. If a later step has overwritten the logits that some
    tokens would take, it `is_undecided` and holds nothing else.
    """

    widths: frozenset[int]
    sampled: list[SampledToken]
    scored: list[tuple[Sequence, list[TokenLogprob]]] = field(default_factory=list)
    is_undecided: bool = False
    in_one_pass: bool = False


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that has begun: `result` waits for it, once, and is told whether a step has been launched after it.

    `decode` is set where the GPU computes it meanwhile.
    """

    chunks: tuple[Chunk, ...]
    result: Callable[[bool], StepOutput]
    decode: LaunchedDecode | None = None


class Runner:
    """Holds the model and the KV pool; knows no queues and no clients."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._pool = pool
        self._graphs = DecodeGraphs(decoder, pool) if DecodeGraphs.can_serve(decoder, pool) else None

    @property
    def seal_seconds(self) -> dict[str, float]:
        """By sealed format, the time that its pages took to be encoded."""
        return {name: sealed.clock.seconds for name, sealed in self._pool.sealed.items()}

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured as graphs."""
        return self._graphs is not None

    @torch.inference_mode()
    def capture(self, shape: StepShape) -> bool:
        """`DecodeGraphs.capture`, while no step is under way; False where steps are not captured."""
        return self._graphs is not None and self._graphs.capture(shape)

    def compile_mixed(self, widths: tuple[int, ...], num_rows: int) -> None:
        """Compile what a step of these widths needs, from any thread; nothing where steps are not captured."""
        if self._graphs is not None:
            self._graphs.compile_mixed(widths, num_rows)

    @torch.inference_mode()
    def launch(self, chunks: ReadOnly[Chunk]) -> LaunchedStep:
        """Begin a step; what is not captured as a graph is computed at once."""
        if self._graphs is not None and self._graphs.covers(chunks):
            params = [chunk.sequence.request.sampling for chunk in chunks]
            has_draws = any(map(is_drawn, params)) and not any(map(_needs_logits, params))
            return _launched(tuple(chunks), self._graphs.launch(chunks, has_draws))
        output = self._run(chunks)
        return LaunchedStep(tuple(chunks), lambda is_followed: output)

    def can_launch_after(self, step: LaunchedStep) -> bool:
        """Whether the GPU alone decides what a step's sequences go on with."""
        if step.decode is None:
            return False
        if any(sequence.draws_from_all for sequence in step.decode.sequences):
            return False
        params = [sequence.request.sampling for sequence in step.decode.sequences]
        return not any(map(_needs_logits, params)) and (step.decode.shape.has_draws or not any(map(is_drawn, params)))

    @torch.inference_mode()
    def launch_after(self, step: LaunchedStep) -> LaunchedStep:
        """Begin the next token of each of a step's sequences before the step has ended.

        For steps that `can_launch_after` admits; the caller has given the sequences pages for that token. Of a sequence
        that turns out to have ended, the result means nothing.
        """
        if self._graphs is None or step.decode is None:
            raise ValueError("The step was not captured as a graph.")
        return _launched(step.chunks, self._graphs.launch_after(step.decode))

    def _run(self, chunks: ReadOnly[Chunk]) -> StepOutput:
        plan = plan_batch(chunks, self._decoder.device)
        hidden = self._decoder.forward(plan, self._pool)
        return StepOutput(
            frozenset(width for width, _, _ in plan.segments),
            self._sample(plan, hidden) if plan.sampled else [],
            [
                (
                    rows.sequence,
                    score_rows(
                        self._decoder,
                        hidden[rows.row_ids],
                        rows.token_ids,
                        rows.sequence.request.sampling.num_prompt_logprobs or 0,
                    ),
                )
                for rows in plan.scored
            ],
        )

    def _sample(self, plan: BatchPlan, hidden: Tensor) -> list[SampledToken]:
        # As many as there are rows: then they are the rows, in order.
        logits = self._decoder.logits(hidden if len(plan.sampled) == hidden.shape[0] else hidden[plan.sampled_rows])
        return choose_tokens(logits, plan.sampled)


def _launched(chunks: tuple[Chunk, ...], decode: LaunchedDecode) -> LaunchedStep:
    @torch.inference_mode()
    def result(is_followed: bool) -> StepOutput:
        step = decode.result()
        widths = frozenset(decode.shape.widths)
        for sequence, token in zip(decode.sequences, step.found.tokens, strict=True):
            sequence.draws_from_all |= token == UNDECIDED
        if is_followed and UNDECIDED in step.found.tokens:
            return StepOutput(widths, [], is_undecided=True, in_one_pass=True)
        return StepOutput(widths, choose_tokens(step.logits, decode.sequences, step.found), in_one_pass=True)

    return LaunchedStep(chunks, result, decode)


def _needs_logits(params: SamplingParams) -> bool:
    """Whether a request's logits are changed before a token is chosen, or reported on."""
    return params.num_logprobs is not None or changes_logits(params)


def choose_tokens(
    logits: Tensor, sequences: ReadOnly[Sequence], found: FoundTokens | None = None
) -> list[SampledToken]:
    """The next token of each sequence from float32 logits [sequences, vocab], which penalties and biases change in place."""
    params = [sequence.request.sampling for sequence in sequences]
    reporting = [row for row, param in enumerate(params) if param.num_logprobs is not None]
    own_logits = logits[reporting] if reporting else None  # a copy, which penalties leave alone
    if adjust_logits(logits, sequences):
        found = None
    token_ids = sample(logits, params, [sequence.num_generated for sequence in sequences], found)
    logprobs: dict[int, TokenLogprob] = {}
    if own_logits is not None:
        tokens = [token_ids[row] or 0 for row in reporting]
        num_top = [params[row].num_logprobs or 0 for row in reporting]
        logprobs = dict(zip(reporting, token_logprobs(own_logits, tokens, num_top), strict=True))
    return [
        SampledToken(sequence, token_id, logprobs.get(row))
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
    ]
