"""Executes one step on the device: plan, forward pass, sampling."""

from collections.abc import Sequence as ReadOnly

from anybit.engine.batch import BatchPlan, Chunk, plan_batch
from anybit.engine.models.decoder import Decoder
from anybit.engine.penalties import adjust_logits
from anybit.engine.sampling import sample
from anybit.engine.sequence import Sequence
from anybit.kvcache.pool import KVPool


class Runner:
    """Holds the model and the KV pool; knows no queues and no clients."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._pool = pool

    def run(self, chunks: ReadOnly[Chunk]) -> tuple[BatchPlan, list[tuple[Sequence, int | None]]]:
        """Compute the chunks; returns the plan and, for each sequence that can go on, its next token.

        The token is None for a sequence whose logits were not finite.
        """
        plan = plan_batch(chunks, self._decoder.device)
        logits = self._decoder.forward(plan, self._pool)
        adjust_logits(logits, plan.sampled)
        params = [sequence.request.sampling for sequence in plan.sampled]
        counts = [sequence.num_generated for sequence in plan.sampled]
        tokens = sample(logits, params, counts) if plan.sampled else []
        return plan, list(zip(plan.sampled, tokens, strict=True))
