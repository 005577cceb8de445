"""Log lines on standard error, in the form of the setting `log_formatter`."""

import logging
import sys
from typing import Literal

import msgspec

Form = Literal["color", "text", "json", "multi"]

_TEXT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
_COLORS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


def configure(form: Form, *, debug: bool) -> None:
    """Set up the process's logging. `color` is `text` where standard error is no terminal; `multi` is `text`."""
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter())
    elif form == "color" and sys.stderr.isatty():
        handler.setFormatter(ColorFormatter(_TEXT))
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


class ColorFormatter(logging.Formatter):
    """Text, colored by level."""

    def format(self, record: logging.LogRecord) -> str:
        color = _COLORS.get(record.levelno)
        text = super().format(record)
        return f"\x1b[{color}m{text}\x1b[0m" if color else text
