"""What the records' settings ask for and cannot be done ends a command before anything starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2p_pipeline.cli.app import app

COMMANDS = (["receive"], ["up"], ["convert", "in.ndjson"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"TRANSFORM": "no_such_module:f"}, "transform = 'no_such_module:f': cannot be imported: ModuleNotFoundError"),
        ({"MASK_FIELDS": "audit"}, "audit is a bool and cannot hold '*'"),
        (
            {"RECORD_TYPE": "dynamic", "JSON_SCHEMA_PATH": "nowhere.json"},
            "json_schema_path = nowhere.json: No such file",
        ),
        (
            {"RECORD_TYPE": "dynamic", "JSON_SCHEMA_PATH": "schema.json"},
            "JSON Schema, /properties/a/$ref: 'other.json' is not in this document",
        ),
        (
            {"RECORD_TYPE": "dynamic", "JSON_SCHEMA_PATH": "latin"},
            "json_schema_path = latin: is no UTF-8 text",
        ),
    ],
)
def test_it_is_told_and_the_exit_code_is_2(
    command: list[str], settings: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type":"object","properties":{"a":{"$ref":"other.json"}}}')
    (tmp_path / "latin").write_bytes(b'{"title":"\xe9"}')
    (tmp_path / "in.ndjson").write_text("{}\n")
    result = CliRunner().invoke(app, command, env={f"D2P_{name}": value for name, value in settings.items()})
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ndjson", "latin", "schema.json"]
