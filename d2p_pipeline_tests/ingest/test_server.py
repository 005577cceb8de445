"""The server around the receiver: TLS and client certificates, tokens that rotate, metrics of all workers, OpenAPI."""

import asyncio
import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from d2p_pipeline.buffer.protocol import Seal
from d2p_pipeline.buffer.redis import RedisBuffer
from d2p_pipeline.ingest import http, openapi
from d2p_pipeline.ingest.tokens import TokenFileError, Tokens, read
from d2p_pipeline_tests.receiving import RunningReceiver, StartReceiver, client_of
from d2p_pipeline_tests.system import until

GOOD: dict[str, Any] = {
    "time": "2026-11-21T10:00:00Z",
    "level": "info",
    "message": "hello",
    "business-capability": "payments",
    "business-domain": "d",
    "business-service": "s",
    "application-service": "a",
}
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboard.json"
GUIDE = Path(__file__).parents[2] / "docs" / "receiver.md"


# --- TLS


@dataclass(frozen=True)
class Authority:
    """Signs certificates into a directory."""

    directory: Path
    name: str

    def __post_init__(self) -> None:
        self._write(self.name, is_authority=True)

    @property
    def certificate(self) -> Path:
        return self.directory / f"{self.name}.pem"

    def sign(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of `name`."""
        self._write(name, is_authority=False)
        return self.directory / f"{name}.pem", self.directory / f"{name}.key"

    def _write(self, name: str, *, is_authority: bool) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        (self.directory / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        signer: Any = key
        if not is_authority:
            signer = serialization.load_pem_private_key((self.directory / f"{self.name}.key").read_bytes(), None)
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        subject, issuer = (
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)]) for common in (name, self.name)
        )
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder(
                issuer, subject, key.public_key(), x509.random_serial_number(), now - day, now + day
            )
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(addresses, critical=False)
            .sign(signer, hashes.SHA256())
        )
        (self.directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def test_https_with_and_without_client_certificates(
    start_receiver: StartReceiver, redis_client: Redis, tmp_path: Path
) -> None:
    ours, strangers = Authority(tmp_path, "authority"), Authority(tmp_path, "strangers")
    certificate, key = ours.sign("server")
    tls = {"tls_cert": str(certificate), "tls_key": str(key)}

    def post(receiver: RunningReceiver, client: tuple[Path, Path] | None = None) -> int:
        context = ssl.create_default_context(cafile=str(ours.certificate))
        if client:
            context.load_cert_chain(*client)
        with httpx.Client(verify=context, timeout=30) as connection:
            return connection.post(f"{receiver.url}/record/", json=GOOD).status_code

    open_to_all = start_receiver(**tls)
    assert post(open_to_all) == 201
    with pytest.raises(httpx.TransportError):
        httpx.post(open_to_all.url.replace("https", "http") + "/record/", json=GOOD)
    guarded = start_receiver(**tls, tls_client_ca=str(ours.certificate))
    assert post(guarded, ours.sign("client")) == 201
    for client in (None, strangers.sign("stranger")):
        with pytest.raises(httpx.TransportError):
            post(guarded, client)
    assert redis_client.hget("stats:{payments}", "records") == b"2"


def test_a_tls_client_that_does_not_say_goodbye_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path, "authority")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(*authority.sign("server"))
    theirs = ssl.create_default_context(cafile=str(authority.certificate))
    monkeypatch.setattr(http, "LINGER_SECONDS", 0.1)

    def connect(port: int) -> ssl.SSLSocket:
        client = theirs.wrap_socket(socket.create_connection(("127.0.0.1", port), 30), server_hostname="127.0.0.1")
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        return client

    async def run() -> None:
        service = http.Service(
            lambda exchange: exchange.answer(200, (), b""), head_seconds=60, body_seconds=60, most=10
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            accepting = asyncio.create_task(service.accept(listener, ours))
            with await asyncio.to_thread(connect, listener.getsockname()[1]):
                accepting.cancel()
                await service.drain(15)
                assert not service.connections

    uvloop.run(run())


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_used_end_it_with_exit_code_2(
    start_receiver: StartReceiver, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "file.pem"
    if content:
        path.write_text(content)
    with pytest.raises(AssertionError, match=f"the receiver cannot start: tls_cert {path} .* cannot be used"):
        start_receiver(tls_cert=str(path), tls_key=str(path))


# --- tokens


def test_tokens_of_a_file_rotate_without_a_restart(
    start_receiver: StartReceiver, redis_client: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text("# of November\nold-token\n\n")
    receiver = start_receiver(tokens="fixed", tokens_file=str(path))

    def status(token: str) -> int:
        headers = {"authorization": f"Bearer {token}"}
        return receiver.client.post("/record/", json=GOOD, headers=headers).status_code

    assert (status("old-token"), status("fixed"), status("new-token")) == (201, 201, 401)
    path.write_text("old-token\nnew-token\n")
    until(lambda: status("new-token") == 201)
    assert status("old-token") == 201
    path.write_text("new-token\n")
    until(lambda: status("old-token") == 401)
    path.write_text("")  # by mistake: the tokens stay as they were
    until(lambda: "holds no token" in receiver.log.read_text() or status("new-token") != 201)
    assert (status("new-token"), status("fixed"), status("wrong")) == (201, 201, 401)
    for open_path in ("/healthcheck/", "/ready", "/openapi.json"):
        assert receiver.client.get(open_path).status_code == 200
    assert receiver.client.get("/metrics").status_code == 401
    assert receiver.client.get("/metrics", headers={"authorization": "bearer fixed"}).status_code == 200


@pytest.mark.parametrize("content", [None, "", "# none\n", "two words\n", "\xff"])
def test_a_file_without_usable_tokens_is_refused_at_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content, "latin-1")
    with pytest.raises(TokenFileError, match="tokens"):
        read(path)
    with pytest.raises(TokenFileError):
        Tokens(["fixed"], path)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic token", "token", "Bearer tokens", "Bearer \ud800"])
def test_what_is_no_token_is_none(header: str) -> None:
    assert not Tokens(["token"]).allow(header)
    assert Tokens(["token"]).allow("Bearer token")


# --- metrics


def metrics_of(receiver: RunningReceiver) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name and values of the labels."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(receiver.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_metrics_of_all_workers_and_of_redis(
    start_receiver: StartReceiver, redis_client: Redis, redis_buffer: RedisBuffer
) -> None:
    receiver = start_receiver(workers="2", access_log="true")
    body = "\n".join([*[json.dumps({**GOOD, "message": str(number)}) for number in range(4)], "cut"])
    for _ in range(6):  # over new connections, so that both workers have their turn
        with client_of(receiver.url) as client:
            client.post("/records", content=body)
            client.post("/record/", content="nonsense")
            client.get("/nowhere")
        with socket.create_connection(("127.0.0.1", int(receiver.url.rsplit(":", 1)[1])), 30) as connection:
            connection.sendall(b"no request\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    [batch] = redis_buffer.seal([Seal("payments", "B1", "age")])
    claim = redis_buffer.claim(batch.ref, "run", 60_000)
    assert claim
    redis_buffer.acknowledge(claim, 0, units=2, rows=10, files=[1000])
    found = metrics_of(receiver)
    assert len(re.findall(r"POST /records 202 \d+\.\d+ ms$", receiver.log.read_text(), re.M)) == 6
    requests = {labels: count for labels, count in found["d2p_http_requests_total"].items() if "check" not in labels[0]}
    assert requests == {("/record", "400"): 6, ("/records", "202"): 6, ("other", "404"): 6, ("other", "400"): 6}
    assert found["d2p_received_records_total"] == {("accepted",): 24, ("dead_lettered",): 6}
    assert found["d2p_http_refused_total"] == {("record_invalid",): 6, ("no_such_path",): 6, ("no_request",): 6}
    assert found["d2p_received_bytes_total"][()] == 6 * len(body)
    assert found["d2p_http_request_seconds_count"][("/records",)] == 6
    assert 0 < found["d2p_http_request_seconds_sum"][("/records",)] < 600
    within = [count for (_, route), count in found["d2p_http_request_seconds_bucket"].items() if route == "/records"]
    assert (within, within[-1]) == (sorted(within), 6)
    assert found["d2p_commit_requests_sum"][()] == 6
    assert found["d2p_redis_up"][()] == 1
    assert found["d2p_batches"] == {("open",): 1, ("recovery",): 0}
    assert found["d2p_sealed_batches_total"] == {("age",): 1}
    assert (found["d2p_files_total"][()], found["d2p_file_bytes_total"][()]) == (1, 1000)
    places = {place: value for (place,), value in found["d2p_books_records"].items()}
    assert places["accepted"] == 30
    assert (places["rows"], places["dead_letters"], places["batches"]) == (10, 6, 14)
    assert found["d2p_books_unbalanced_records"][()] == 0
    assert found["d2p_dead_letters_kept"][()] == 6


def test_a_lost_record_unbalances_the_books(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    receiver.client.post("/record/", json=GOOD)
    redis_client.hincrby("totals:{payments}", "accepted", 3)
    assert metrics_of(receiver)["d2p_books_unbalanced_records"][()] == 3


def test_many_keys_have_a_bounded_number_of_series(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    body = "\n".join(json.dumps({**GOOD, "business-capability": f"key {number}"}) for number in range(300))
    assert receiver.client.post("/records", content=body).json()["accepted"] == 300
    found = metrics_of(receiver)
    assert len(found["d2p_buffer_records"]) == 51
    assert sum(found["d2p_buffer_records"].values()) == 300
    assert found["d2p_keys"][()] == 300


@pytest.mark.skipif(not DASHBOARD.exists(), reason="an installed package has no deploy directory")
def test_every_metric_of_the_dashboard_exists(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()
    receiver.client.post("/record/", json=GOOD)
    receiver.client.post("/record/", content="refused")
    families = list(text_string_to_metric_families(receiver.client.get("/metrics").text))
    known = {sample.name for family in families for sample in family.samples}
    # Those that have samples only once something happened.
    known |= {f"{family.name}_total" for family in families if family.type == "counter"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    used = {
        name
        for panel in panels
        for target in panel.get("targets", [])
        for name in re.findall(r"d2p_[a-z_]+", target["expr"])
    }
    assert len(used) > 20
    assert used - known == set()


# --- the rest


def test_the_openapi_document_is_valid_and_names_every_route(receiver: RunningReceiver) -> None:
    document = receiver.client.get("/openapi.json").json()
    assert document == json.loads(openapi.document())
    assert "openapi" not in receiver.log.read_text()  # no access log, as nobody asked for it
    validate(document)
    for path, operations in document["paths"].items():
        for method in operations:
            if method == "get":
                assert receiver.client.get(path).status_code == 200
    listed = receiver.client.get("/nowhere").json()["error"]
    assert all(path.rstrip("/") in listed for path in document["paths"])


@pytest.mark.skipif(not GUIDE.exists(), reason="an installed package has no docs directory")
def test_the_openapi_document_has_every_answer_of_the_guide() -> None:
    statuses = {
        status
        for row in re.findall(r"^\| (\d{3}(?:, \d{3})*) \|", GUIDE.read_text(), re.M)
        for status in row.split(", ")
    }
    assert len(statuses) > 10
    posts = [one["post"]["responses"] for one in json.loads(openapi.document())["paths"].values() if "post" in one]
    assert [statuses - {*post} for post in posts] == [{"404", "405"}] * 3  # of other paths and methods


def test_pipelined_requests_are_answered_in_order(receiver: RunningReceiver, redis_client: Redis) -> None:
    record = json.dumps(GOOD).encode()
    request = b"POST /record/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(record), record)
    port = int(receiver.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request * 20 + b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b""
        while data := connection.recv(65536):
            answers += data
    assert answers.count(b"HTTP/1.1 201") == 20
    assert answers.rindex(b"HTTP/1.1 201") < answers.index(b"HTTP/1.1 404")


def test_a_worker_that_dies_is_replaced(start_receiver: StartReceiver, redis_client: Redis) -> None:
    receiver = start_receiver()

    def workers() -> list[int]:
        text = Path(f"/proc/{receiver.process.pid}/task/{receiver.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    [worker] = workers()
    os.kill(worker, signal.SIGKILL)

    def is_served() -> bool:
        try:
            return httpx.post(f"{receiver.url}/record/", json=GOOD, timeout=5, verify=False).status_code == 201
        except httpx.TransportError:
            return False

    until(is_served)
    assert receiver.process.poll() is None
    assert worker not in workers()
