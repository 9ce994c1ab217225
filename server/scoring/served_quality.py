"""What each width of a server is worth, for the report on its speed: perplexity of the built-in text."""

from typing import Any

from anybit.engine.errors import SourceError
from anybit.server.bench.client import http_client
from anybit.server.bench.target import TargetError
from anybit.server.scoring.client import ScoringClient
from anybit.server.scoring.run import Progress, ScoringOptions, evaluate_server

_CONTEXT = 1024


async def served_quality(
    base_url: str,
    api_key: str | None,
    model: str,
    bit_width: str,
    max_tokens: int,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """`text`, `tokens`, `context` and `results` of the `eval` report, in windows as long as the server takes them.

    `note` is None, or the sentence that says why there are no results.
    """
    try:
        async with http_client(base_url, api_key) as http:
            _, max_model_len = await ScoringClient(http, base_url, model).tokenize("a")
        options = ScoringOptions(
            context=min(_CONTEXT, max_model_len, max_tokens), max_tokens=max_tokens, bit_width=bit_width
        )
        report = await evaluate_server(base_url, api_key, model, options, progress)
    except (TargetError, SourceError) as error:
        return {"text": None, "tokens": 0, "context": None, "results": [], "note": str(error)}
    return {name: report[name] for name in ("text", "tokens", "context", "results")} | {"note": None}
