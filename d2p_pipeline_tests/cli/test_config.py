import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from d2p_pipeline.cli.config import config
from d2p_pipeline.settings import HIDDEN, Settings

app = typer.Typer()
app.command()(config)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"D2P_{name.upper()}", raising=False)
    yield


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_every_setting_is_printed_as_toml_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "d2p.toml"
    file.write_text("buffer_size = 7\nport = 9000\n")
    monkeypatch.setenv("D2P_PORT", "9001")
    result = run("--config", str(file))
    assert result.exit_code == 0
    assert set(tomllib.loads(result.stdout)) == set(Settings.model_fields)
    lines = result.stdout.splitlines()
    assert "buffer_size = 7  # file" in lines
    assert "port = 9001  # env" in lines
    assert "dagster_port = 3000  # default" in lines
    assert 'key_fields = ["business-capability"]  # default' in lines
    assert f'config = "{file}"  # flag' in lines


def test_json_output_has_value_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_USE_HASH", "true")
    printed = json.loads(run("--json").stdout)
    assert set(printed) == set(Settings.model_fields)
    assert printed["use_hash"] == {"value": True, "source": "env"}
    assert printed["redis_url"] == {"value": None, "source": "default"}


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_secrets_are_hidden(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2P_REDIS_PASSWORD", "swordfish")
    monkeypatch.setenv("D2P_REDIS_URL", "rediss://app:swordfish@redis.example:6380/2")
    monkeypatch.setenv("D2P_HMAC_KEY", "swordfish")
    monkeypatch.setenv("D2P_TOKENS", "swordfish,swordfish2")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "swordfish" not in result.output
    assert f"rediss://app:{HIDDEN}@redis.example:6380/2" in result.stdout
    assert result.stdout.count(HIDDEN) == 5


def test_notes_go_to_standard_error_and_leave_the_output_readable(tmp_path: Path) -> None:
    file = tmp_path / "d2p.json"
    file.write_text('{"log_path": "./logs"}')
    result = run("--config", str(file), "--json")
    assert "log_path: logs go to standard error; ignored" in result.stderr
    assert json.loads(result.stdout)


def test_invalid_settings_exit_with_2_and_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "d2p.json"
    file.write_text('{"buffer_size": -1, "writer_tipe": "file"}')
    result = run("--config", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "buffer_size = -1" in result.stderr
    assert "the nearest is writer_type" in result.stderr


def test_a_missing_file_exits_with_2(tmp_path: Path) -> None:
    result = run("--config", str(tmp_path / "absent.json"))
    assert result.exit_code == 2
    assert "absent.json" in result.stderr


def test_importing_the_command_imports_no_settings() -> None:
    code = "import sys, d2p_pipeline.cli.config; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
