"""What is at the other end: address, model, widths on offer."""

from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from anybit.engine.errors import AnyBitError
from anybit.server.bench.client import body_message, describe

_TIMEOUT_SECONDS = 30.0


class TargetError(AnyBitError):
    """The server cannot be reached, refuses to answer, or does not offer what is to be measured."""


@dataclass(frozen=True, slots=True)
class Target:
    model: str
    bit_widths: list[int]  # ascending; empty for a server that has no widths to choose from
    version: Any  # what its /version says, None when it has none
    effective_bits: dict[int, float] = field(default_factory=dict)  # by width, where the server tells
    bytes_read_per_token: dict[int, int] = field(default_factory=dict)  # likewise

    def choose(self, text: str) -> list[int | None]:
        """ "" -> the server's default, "all" -> every width on offer, "2,4" -> these. Raises TargetError for others."""
        if text == "" or (text == "all" and not self.bit_widths):
            return [None]
        if text == "all":
            return list(self.bit_widths)
        asked = sorted({int(part) for part in text.split(",")})
        for width in asked:
            # Others would ignore the field, and the row would say a width that nothing was computed at.
            if width not in self.bit_widths:
                offer = ", ".join(map(str, self.bit_widths)) or "none to choose from"
                raise TargetError(f"The server does not list the bit-width {width} for {self.model}; it has {offer}.")
        return list(asked)


class _Card(msgspec.Struct):
    id: str
    bit_width: int | None = None
    effective_bits: float | None = None
    bytes_read_per_token: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


def normalize_base_url(text: str) -> str:
    """The address up to and including /v1, however much of that was given. Raises ValueError if it is none."""
    try:
        url = httpx.URL(text.strip().rstrip("/"))
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("an address begins with http:// or https://")
    if url.userinfo:
        raise ValueError("a key belongs into --api-key, because the address is printed")
    address = str(url)
    return address if address.endswith("/v1") else f"{address}/v1"


async def find_target(http: httpx.AsyncClient, base_url: str, model: str | None) -> Target:
    """Ask the server what it serves; `model` None is its first. Raises TargetError with a sentence if that fails."""
    cards = await _cards(http, base_url, needed=model is None)
    if model is None:
        if not cards:
            raise TargetError(f"{base_url}/models lists no model; give one with --model.")
        model = cards[0].id
    aliases = {card.bit_width: card for card in cards if card.bit_width is not None and card.id.startswith(f"{model}@")}
    bits = {width: card.effective_bits for width, card in aliases.items() if card.effective_bits is not None}
    sizes = {w: card.bytes_read_per_token for w, card in aliases.items() if card.bytes_read_per_token is not None}
    return Target(model, sorted(aliases), await _version(http, base_url), bits, sizes)


async def _cards(http: httpx.AsyncClient, base_url: str, needed: bool) -> list[_Card]:
    url = f"{base_url}/models"
    try:
        response = await http.get(url, timeout=_TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise TargetError(f"{base_url} cannot be reached: {describe(error).rstrip('.')}.") from error
    if response.status_code in (401, 403):
        raise TargetError(f"{base_url} wants another API key; give it with --api-key.")
    try:
        if response.status_code == 200:
            return msgspec.json.decode(response.content, type=_Cards).data
        problem = f"answered {response.status_code}: {body_message(response.text).rstrip('.')}"
    except msgspec.DecodeError:
        problem = "did not answer with a list of models, as an OpenAI-compatible server would"
    # Not every server lists its models, and with a name there is no need to.
    if needed or response.status_code >= 500:
        raise TargetError(f"{url} {problem}.")
    return []


async def _version(http: httpx.AsyncClient, base_url: str) -> Any:
    try:
        response = await http.get(base_url.removesuffix("/v1") + "/version", timeout=_TIMEOUT_SECONDS)
        return msgspec.json.decode(response.content) if response.status_code == 200 else None
    except (httpx.HTTPError, msgspec.DecodeError):
        return None
