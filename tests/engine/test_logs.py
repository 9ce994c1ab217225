"""Log lines for machines."""

import json
import logging
import subprocess
import sys
from datetime import datetime

from anybit.engine.logs import JsonFormatter, current_request_id


def logged(message: str, *arguments: object, **fields: object) -> dict[str, object]:
    record = logging.getLogger("anybit.test").makeRecord(
        "anybit.test", logging.WARNING, "file.py", 1, message, arguments, fields.pop("exc_info", None), extra=fields
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return dict(json.loads(line))


def test_line_has_time_level_logger_and_message() -> None:
    line = logged("%d of %d", 2, 3)
    moment = datetime.fromisoformat(str(line.pop("time")))
    assert moment.tzinfo is not None
    assert line == {"level": "WARNING", "logger": "anybit.test", "message": "2 of 3"}


def test_line_has_the_callers_fields_and_the_request_id_of_its_context() -> None:
    token = current_request_id.set("req-7")
    try:
        line = logged('a "quoted"\nmessage', bit_width="4", seconds=0.25)
    finally:
        current_request_id.reset(token)
    assert (line["request_id"], line["bit_width"], line["seconds"]) == ("req-7", "4", 0.25)
    assert "request_id" not in logged("later")


def test_exception_is_a_field() -> None:
    try:
        raise ValueError("too wide")
    except ValueError:
        line = logged("failed", exc_info=sys.exc_info())
    assert str(line["exception"]).endswith("ValueError: too wide")


def test_configured_process_writes_json_of_its_level_to_standard_error() -> None:
    script = (
        "import logging; from anybit.engine.logs import *; configure_logging(LogSettings('INFO', 'json'));"
        "logging.getLogger('a').info('one'); logging.getLogger('a').debug('two')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["one"]
