"""The log of a server: a line per request, as JSON or for people, without users' texts unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_KNOWN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """A record as a line for people: the time of day, the event, and its fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        shown = [f"{name}={_shown(value)}" for name, value in fields_of(record).items()]
        line = " ".join([moment, record.getMessage(), *shown])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the caller gave a record with `extra`, without those that are None."""
    return {name: value for name, value in record.__dict__.items() if name not in _KNOWN and value is not None}


def _shown(value: Any) -> str:
    """Return a value as part of a line: names of tasks come from users and may hold line breaks."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def set_up_logs(*, as_json: bool) -> None:
    """Send the records of this server and of uvicorn to standard error, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    for name, level in (("manyicl", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
