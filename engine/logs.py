"""How log lines look: text for people, or a JSON object per line for machines. Loads no torch."""

import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

LOG_FORMATS = ("text", "json")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The HTTP request that is being answered; every JSON line logged meanwhile carries it."""

_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What a process logs, and in which of LOG_FORMATS."""

    level: str = "INFO"
    format: str = "text"


DEFAULT_LOGS = LogSettings()


class JsonFormatter(logging.Formatter):
    """One object per line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and what the caller gave as `extra`.

    `request_id` is there while a request is answered, `exception` where one was logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = current_request_id.get()
        if request_id is not None:
            line["request_id"] = request_id
        line |= {name: value for name, value in vars(record).items() if name not in _ORDINARY}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(settings: LogSettings) -> None:
    """Write log lines of the level and above to standard error."""
    logging.basicConfig(level=settings.level, format=TEXT_FORMAT)
    if settings.format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
