"""Which model, width and KV format a request asks for: header, body field and model alias become one value."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from anybit.engine.precision import AT_LEAST, Precision
from anybit.engine.types import ModelInfo
from anybit.server.config import ALIAS_SUFFIX
from anybit.server.errors import InvalidRequestError, ModelNotFoundError, shorten
from anybit.server.protocol.common import GenerationFields

BIT_WIDTH_HEADER = "X-Bit-Width"
KV_FORMAT_HEADER = "X-KV-Format"

_PRECISION = re.compile(rf"({AT_LEAST})?([1-9][0-9]?)")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What will answer a request."""

    name: str  # as the client asked for it
    precision: Precision
    kv_format: str


def model_alias(model_name: str, bit_width: int) -> str:
    """The model id under which a client that can send nothing else asks for a width."""
    return f"{model_name}@{bit_width}bit"


def choose_model(body: GenerationFields, headers: Headers, model_name: str, model: ModelInfo) -> ModelChoice:
    """The one choice that all forms in the request agree on.

    Raises ModelNotFoundError for a model that is not served and InvalidRequestError for a width or format that is not
    on offer, or for two forms that disagree.
    """
    forms = {f"the header {BIT_WIDTH_HEADER}": text for text in headers.getlist(BIT_WIDTH_HEADER)[:1]}
    if len(set(headers.getlist(BIT_WIDTH_HEADER))) > 1:
        raise InvalidRequestError(f"The header {BIT_WIDTH_HEADER} is given twice.", param=BIT_WIDTH_HEADER)
    if body.bit_width is not None:
        forms["the field bit_width"] = str(body.bit_width)
    alias_width = _alias_width(body.model, model_name)
    if alias_width is not None:
        forms["the model name"] = alias_width
    asked = {form: _parse_precision(text, form, model) for form, text in forms.items()}
    if len(set(asked.values())) > 1:
        stated = ", ".join(f"{form} says {precision.label}" for form, precision in asked.items())
        raise InvalidRequestError(f"The request disagrees with itself: {stated}.", param="bit_width")
    precision = next(iter(asked.values()), Precision(model.default_bit_width))
    return ModelChoice(body.model or model_name, precision, _choose_kv_format(body, headers, model))


def check_model_name(requested: str | None, model_name: str, model: ModelInfo) -> None:
    """Raise ModelNotFoundError or InvalidRequestError unless this is a name under which the model answers."""
    alias_width = _alias_width(requested, model_name)
    if alias_width is not None:
        _parse_precision(alias_width, "the model name", model)


def _alias_width(requested: str | None, model_name: str) -> str | None:
    if requested is None or requested == model_name:
        return None
    alias = ALIAS_SUFFIX.search(requested)
    if alias is None or requested[: alias.start()] != model_name:
        message = f"The model '{shorten(requested)}' is not served here; this server has '{model_name}'."
        raise ModelNotFoundError(message, param="model")
    return alias[1]


def _parse_precision(text: str, form: str, model: ModelInfo) -> Precision:
    parts = _PRECISION.fullmatch(text)
    if parts is not None and int(parts[2]) in model.bit_widths:
        return Precision(int(parts[2]), at_least=parts[1] is not None)
    param = {"the field bit_width": "bit_width", "the model name": "model"}.get(form, BIT_WIDTH_HEADER)
    offer = ", ".join(map(str, sorted(model.bit_widths)))
    message = f"{form[0].upper()}{form[1:]} asks for the bit-width '{shorten(text)}'; on offer are {offer}."
    raise InvalidRequestError(message, param=param, code="unknown_bit_width")


def _choose_kv_format(body: GenerationFields, headers: Headers, model: ModelInfo) -> str:
    asked = [(KV_FORMAT_HEADER, text) for text in headers.getlist(KV_FORMAT_HEADER)]
    if body.kv_format is not None:
        asked.append(("kv_format", body.kv_format))
    offer = [kv.name for kv in model.kv_formats]
    for param, text in asked:
        if text not in offer:
            stated = f"on offer {'is' if len(offer) == 1 else 'are'} {', '.join(offer)}"
            message = f"The KV format '{shorten(text)}' is not served; {stated}."
            raise InvalidRequestError(message, param=param, code="unknown_kv_format")
    if len({text for _, text in asked}) > 1:
        message = f"The request disagrees with itself about the KV format: {' and '.join(text for _, text in asked)}."
        raise InvalidRequestError(message, param="kv_format")
    return asked[0][1] if asked else model.kv_format
