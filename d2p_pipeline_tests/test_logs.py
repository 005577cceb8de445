import json
import logging
import sys

import pytest

from d2p_pipeline import logs


def emit(form: logs.Form, capsys: pytest.CaptureFixture[str], *, debug: bool = False) -> list[str]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure(form, debug=debug)
        log = logging.getLogger("d2p.test")
        log.debug("detail")
        try:
            raise ValueError("cause")
        except ValueError:
            log.exception("key=%s batch=%s failed\nhere", "payments", "B1")
        return capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:], root.level = before, level


def test_json_lines_are_one_object_each(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = emit("json", capsys)
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == (
        "error",
        "d2p.test",
        "key=payments batch=B1 failed\nhere",
    )
    assert "ValueError: cause" in entry["traceback"]


@pytest.mark.parametrize("form", ["color", "text", "multi"])
def test_text_has_no_colors_where_nobody_sees_them(form: logs.Form, capsys: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    text = "\n".join(emit(form, capsys))
    assert "ERROR   d2p.test key=payments batch=B1 failed" in text
    assert "\x1b" not in text


def test_details_are_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert "detail" in "\n".join(emit("text", capsys, debug=True))
    assert logging.getLogger("httpx").level == logging.NOTSET
    assert "detail" not in "\n".join(emit("text", capsys))
    assert logging.getLogger("httpx").level == logging.WARNING


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_that_is_logged_begins_a_line_or_commands_a_terminal(
    form: logs.Form, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure(form, debug=False)
        try:
            raise ValueError("cause\n2026-11-21 ERROR forged\x1b[2J")
        except ValueError:
            logging.getLogger("d2p.test").exception("key=%s", "a\n2026-11-21 ERROR forged\x1b[2J\ud800")
    finally:
        root.handlers[:], root.level = before, level
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert sum("forged" in line for line in said.splitlines()) == (1 if form == "json" else 3)
    assert not [line for line in said.splitlines() if line.startswith("2026-11-21 ERROR")]
