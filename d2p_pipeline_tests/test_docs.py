"""The documents say what the program does: generated parts are fresh, every command is described and has help."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2p_pipeline.buffer.names import Names
from d2p_pipeline.cli.app import app
from d2p_pipeline.records.fields import markdown_table

ROOT = Path(__file__).parent.parent
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def test_the_field_table_is_the_programs() -> None:
    assert markdown_table() in (ROOT / "docs/record.md").read_text(), "paste the output of fields.markdown_table()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_and_explains_itself(command: str) -> None:
    assert f"| `d2p {command}" in (ROOT / "README.md").read_text()
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_every_document_that_is_linked_exists() -> None:
    import re

    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links {target}"


def test_the_names_in_redis_are_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    names = Names()
    for name in (names.data, names.dlq):
        assert f"`{name}:{{key}}`" in text
    assert f"`{names.keys}`, `{names.batches}`, `{names.recovery}`" in text
