"""Log lines on standard error, in the form of the setting `log_formatter`.

Keys, reasons and errors hold what producers sent. Whatever shows them to people, here, on the command line, in a run's log or
in an alert, shows them `plain`: a record can neither forge a line nor tell a terminal what to do.
"""

import logging
import re
import sys
from typing import Any, Literal

import msgspec

Form = Literal["color", "text", "json", "multi"]

_TEXT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
_COLORS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


# C0, DEL, C1; line and paragraph separators; what turns the direction of text. A tab does nothing.
_OBEYED = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OBEYED_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object) -> str:
    """Text on one line, with what a terminal or a reader of lines would obey written out, as Python does."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], str(text))


def configure(form: Form, *, debug: bool) -> None:
    """Set up the process's logging. `color` is `text` where standard error is no terminal; `multi` is `text`."""
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter())
    elif form == "color" and sys.stderr.isatty():
        handler.setFormatter(ColorFormatter(_TEXT))
    else:
        handler.setFormatter(TextFormatter(_TEXT))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.NOTSET if debug else logging.WARNING)  # it has a line for every request


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().encode(errors="backslashreplace").decode(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


class TextFormatter(logging.Formatter):
    """Plain text: one line, and the lines of a traceback after it, which are indented and so no log lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = _OBEYED_IN_LINES.sub(lambda found: ascii(found[0])[1:-1], super().formatException(ei)).split("\n")
        return "\n".join(f"  {line}" for line in lines)


class ColorFormatter(TextFormatter):
    """Text, colored by level."""

    def format(self, record: logging.LogRecord) -> str:
        color = _COLORS.get(record.levelno)
        text = super().format(record)
        return f"\x1b[{color}m{text}\x1b[0m" if color else text
