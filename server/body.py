"""From the bytes of a request body to a checked protocol model, or to one sentence that says what is wrong."""

import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from anybit.server.errors import InvalidRequestError, shorten
from anybit.server.protocol.common import RequestModel
from anybit.server.protocol.unsupported import drop_neutral

Body = TypeVar("Body", bound=RequestModel)

_UNION_MEMBER = re.compile(r"int|constrained-(str|int)|literal\[.*\]")
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's body as a checked `model`; raises InvalidRequestError."""
    content_type = request.headers.get("content-type", "")
    if not _JSON_TYPE.fullmatch(content_type.strip()):
        raise InvalidRequestError("Send the body as 'Content-Type: application/json'.", code="wrong_content_type")
    return validate(parse_json(await request.body()), model)


def parse_json(raw: bytes) -> Any:
    """The JSON value in `raw`; raises InvalidRequestError."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"The body is not valid UTF-8 at byte {error.start}."
    except json.JSONDecodeError as error:
        message = f"The body is not valid JSON at line {error.lineno}, column {error.colno}."
    except RecursionError:
        message = "The JSON body is nested too deep."
    except ValueError:
        # Python refuses to convert integers of thousands of digits.
        message = "The JSON body holds a number that is too long."
    raise InvalidRequestError(message, code="invalid_json")


def validate(value: Any, model: type[Body]) -> Body:
    """`value` as a checked `model`; raises InvalidRequestError."""
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    fields = drop_neutral(value, model.unsupported_fields)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _to_request_error(error.errors(include_url=False, include_input=False)[0]) from None


def _to_request_error(detail: ErrorDetails) -> InvalidRequestError:
    param = _param(detail)
    match detail["type"]:
        case "extra_forbidden":
            return InvalidRequestError(f"Unknown field '{param}'.", param=param, code="unknown_field")
        case "missing":
            return InvalidRequestError(f"The field '{param}' is required.", param=param, code="missing_field")
        case "sentence":
            return InvalidRequestError(detail["msg"], param=param)
        case _:
            place = "Invalid body" if param is None else f"Invalid value for '{param}'"
            message = detail["msg"][:1].lower() + detail["msg"][1:]
            return InvalidRequestError(f"{place}: {message}.", param=param)


def _param(detail: ErrorDetails) -> str | None:
    stated = detail.get("ctx", {}).get("param")
    if stated is not None:
        return str(stated)
    field, *path = detail["loc"] or ("",)
    # Members of a union add their type's name to the location, which is no field that a client sent.
    names = [str(part) for part in path if not _UNION_MEMBER.fullmatch(str(part))]
    return shorten(".".join([str(field), *names])) or None
