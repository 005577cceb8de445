"""Seeded log records for load tests, demos and benchmarks: NDJSON lines without their newline.

The same arguments give the same lines, byte for byte, once `start` is given; without it each record carries the moment
it was made. Lines are joined from pre-rendered pieces of JSON, so that one core makes records faster than a receiver
takes them; only records spoiled on purpose go through a JSON parser. Standard library only.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Literal, get_args

Profile = Literal["canonical", "d2p"]
Fault = Literal["missing-field", "null-field", "unreadable-time", "truncated", "not-an-object"]

FAULTS: tuple[Fault, ...] = get_args(Fault)

# One record's moment: nanoseconds since 1970, the same as UTC text to the second, and as the head of a ULID.
_Instant = tuple[int, bytes, bytes]

_CAPABILITY = re.compile(rb'"business-capability":\s*"([^"\\]+)"')
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BLOCK = 1000  # records that share one draw of random numbers
_ID = 16  # random characters of a ULID, after the ten of its time
_CROCKFORD = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_CHARACTERS = _CROCKFORD * 8  # a translation table: every byte becomes one of the 32 characters
_PAIRS = [bytes((high, low)) for high in _CROCKFORD for low in _CROCKFORD]


def generate(
    count: int,
    *,
    seed: int = 0,
    profile: Profile = "canonical",
    keys: int = 8,
    bad_ratio: float = 0.0,
    faults: Sequence[Fault] = FAULTS,
    start: datetime | None = None,
    span: timedelta = timedelta(hours=1),
    extra_field: bool = False,
) -> Iterator[bytes]:
    """`count` records as NDJSON lines, UTF-8, no newline.

    `canonical` is about 870 bytes a record, over `keys` capabilities in turn. `d2p` has the fields and distributions of
    Data2Parquet-go's data-generator: 60 combinations of capability, domain, service and application in turn, about
    2.3 kB a record (2.6 kB in the indented form that program writes); `keys` has no effect on it.

    Record times run evenly from `start` (with a time zone) over `span`, or are the wall clock's when `start` is None.
    `message-id` is unique, also among generators that run at once as long as their seeds differ.
    `extra_field` adds a field that the record schema does not know, `build-number`.

    Exactly `round(count * bad_ratio)` records, at places the seed chooses, are spoiled by the `faults` in turn; all but
    `not-an-object` keep their business-capability. Without `truncated` every line is valid JSON.

    Raises ValueError for an argument outside its range.
    """
    if not faults:
        raise ValueError("faults is empty: name at least one, or leave it out for all of them")
    if count < 0 or keys < 1:
        raise ValueError(f"cannot generate count={count} records over keys={keys}: count must be >= 0 and keys >= 1")
    if not 0 <= bad_ratio <= 1:
        raise ValueError(f"bad_ratio={bad_ratio} is no fraction: give a number from 0 to 1")
    if start is not None and start.tzinfo is None:
        raise ValueError(f"start={start.isoformat()} has no time zone: give one, for example UTC")

    rng = Random(seed)
    instants = _instants(count, start, span)
    lines = _d2p(count, rng, instants) if profile == "d2p" else _canonical(count, rng, instants, keys)
    if extra_field:
        lines = (b'%b,"build-number":%d}' % (line[:-1], 4000 + i % 97) for i, line in enumerate(lines))
    if bad_ratio:
        # A generator of its own, so that the good records are the same with and without bad ones among them.
        lines = _spoil(lines, count, bad_ratio, faults, Random(f"faults of {seed}"))
    return lines


def paced(lines: Iterable[bytes], rate: float) -> Iterator[bytes]:
    """The same lines, no faster than `rate` a second on average since the first; 0 is no limit."""
    if not rate:
        yield from lines
        return
    every = max(1, int(rate / 100))  # looking at the clock a hundred times a second is even enough
    began = time.monotonic()
    for i, line in enumerate(lines):
        if i % every == 0 and (ahead := began + i / rate - time.monotonic()) > 0:
            time.sleep(ahead)
        yield line


def capability_of(line: bytes) -> str | None:
    """The business-capability a line names, also a truncated one, found without parsing it; None if it names none."""
    found = _CAPABILITY.search(line)
    return found[1].decode() if found else None


def _instants(count: int, start: datetime | None, span: timedelta) -> Iterator[_Instant]:
    first, length = 0, 0
    if start is not None:
        first = (start - _EPOCH) // timedelta(microseconds=1) * 1000
        length = span // timedelta(microseconds=1) * 1000
    second = high = -1
    text = head = b""
    for i in range(count):
        now = time.time_ns() if start is None else first + length * i // count
        if now // 1_000_000_000 != second:
            second = now // 1_000_000_000
            text = (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S").encode()
        milliseconds = now // 1_000_000
        if milliseconds >> 10 != high:
            high = milliseconds >> 10
            head = b"".join(_PAIRS[high >> shift & 1023] for shift in (30, 20, 10, 0))
        yield now, text, head + _PAIRS[milliseconds & 1023]


def _blocks(count: int) -> Iterator[range]:
    return (range(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK))


def _random_characters(rng: Random, n: int) -> bytes:
    return rng.randbytes(n).translate(_RANDOM_CHARACTERS)


def _fields(**values: object) -> bytes:
    """A piece of an object, without its braces."""
    record = {name.replace("_", "-"): value for name, value in values.items()}
    return json.dumps(record, separators=(",", ":"))[1:-1].encode()


# --- canonical -------------------------------------------------------------------------------------------------------

_CAPABILITIES = (
    *("payments", "orders", "catalog", "identity", "shipping", "billing", "search", "notifications"),
    *("inventory", "pricing", "returns", "loyalty", "fraud", "support", "reporting", "onboarding"),
)
_SERVICES = (("core", "api"), ("core", "worker"), ("gateway", "edge"), ("events", "consumer"))
_RESOURCES = ("invoice", "order", "customer", "cart", "session", "shipment", "quote", "refund", "document", "contract")


def _canonical(count: int, rng: Random, instants: Iterator[_Instant], keys: int) -> Iterator[bytes]:
    heads = [_canonical_head(key, *service) for service in _SERVICES for key in range(keys)]
    outcomes = [_outcome(rng) for _ in range(1024)]
    actors = [_actor(rng) for _ in range(512)]
    hosts = [_host(rng) for _ in range(64)]
    per_cycle = len(heads)
    for block in _blocks(count):
        n = len(block)
        characters = _random_characters(rng, 2 * _ID * n)
        draws = zip(
            block,  # first: a zip stops there, before it takes an instant that belongs to the next block
            range(0, len(characters), 2 * _ID),
            instants,
            rng.choices(outcomes, k=n),
            rng.choices(actors, k=n),
            rng.choices(hosts, k=n),
            strict=False,
        )
        for i, at, (now, text, ulid), outcome, actor, host in draws:
            yield b"".join(
                (
                    b'{"time":"%b.%06dZ",' % (text, now % 1_000_000_000 // 1000),
                    heads[i % per_cycle],
                    outcome,
                    b',"message-id":"',
                    ulid,
                    characters[at : at + _ID],
                    b'","correlation-id":"',
                    ulid,
                    characters[at + _ID : at + 2 * _ID],
                    actor,
                    host,
                )
            )


def _canonical_head(key: int, service: str, application: str) -> bytes:
    turn, place = divmod(key, len(_CAPABILITIES))
    capability = _CAPABILITIES[place] + (f"-{turn + 1}" if turn else "")
    return (
        _fields(
            business_capability=capability,
            business_domain=_CAPABILITIES[place],
            business_service=f"{capability}-{service}",
            application_service=f"{capability}-{application}",
            logger_name=f"com.example.{_CAPABILITIES[place]}.{service}",
        )
        + b","
    )


def _outcome(rng: Random) -> bytes:
    """What was logged: level, message and everything that has to agree with them."""
    resource = rng.choice(_RESOURCES)
    path = f"/v1/{resource}s/{rng.randrange(10**6)}"
    milliseconds = round(rng.lognormvariate(3, 1), 2)
    level = rng.choices(("INFO", "DEBUG", "WARN", "ERROR"), (80, 10, 7, 3))[0]
    if level == "INFO":
        method, status = rng.choice((("GET", 200), ("POST", 201), ("PUT", 204)))
        message = (
            rng.choice(("served", "completed", "finished")) + f" {method} {path} with {status} in {milliseconds} ms"
        )
    elif level == "DEBUG":
        method, status = "GET", 200
        message = f"read {resource} from the cache, {rng.randrange(300)} s old, {rng.randrange(200, 9000)} bytes"
    elif level == "WARN":
        method, status = "POST", rng.choice((409, 422, 429))
        message = f"{method} {path} answered {status}, attempt {rng.randrange(2, 6)} of 6, retrying"
    else:
        method, status = "POST", rng.choice((500, 502, 503, 504))
        message = f'{method} {path} failed: the {resource} store answered "{status}" after {milliseconds} ms'
    record: dict[str, object] = {
        "level": level,
        "message": message,
        "http_response": str(status),
        "duration": str(milliseconds),
        "args": {"method": method, "path": path, "bytes": str(rng.randrange(100, 60_000))},
        "tags": rng.sample(("http", "public", "internal", "mobile", "web", "batch", "canary"), k=2),
    }
    if level == "ERROR":
        record["error"] = f"{resource} store unavailable"
        record["error_code"] = f"E{status}{rng.randrange(100):02d}"
        record["stack_trace"] = (
            f'Traceback (most recent call last):\n  File "/app/{resource}/store.py", line {rng.randrange(20, 900)}, '
            f"in save\nConnectionError: {status}"
        )
    return _fields(**record)


def _actor(rng: Random) -> bytes:
    """Who caused it: the same few sessions come back, as they do in real logs."""
    session, user, device = (_random_characters(rng, 26).decode() for _ in range(3))
    address = f"{rng.randrange(11, 190)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
    return b'",' + _fields(
        session_id=session, user_id=user, device_id=device, trace_ip=[address, f"10.0.{rng.randrange(256)}.17"]
    )


def _host(rng: Random) -> bytes:
    """Where it ran; closes the record."""
    region = rng.choice(("us-east-1", "eu-west-1", "sa-east-1"))
    return (
        b","
        + _fields(
            audit=rng.random() < 0.1,
            auto_index=True,
            az=region + rng.choice("abc"),
            cloud_provider="aws",
            region=region,
            resource_type=rng.choice(("ec2", "eks", "lambda")),
            source_id=f"i-{rng.getrandbits(68):017x}",
            thread_name=f"worker-{rng.randrange(32)}",
        )
        + b"}"
    )


# --- d2p -------------------------------------------------------------------------------------------------------------

_LOREM_WORDS = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit a ac accumsan ad aenean aliquam aliquet ante aptent arcu "
    "at auctor augue bibendum blandit class commodo condimentum congue consequat conubia convallis cras cubilia cum "
    "curabitur curae cursus dapibus diam dictum dictumst dignissim dis donec dui duis efficitur egestas eget eleifend "
    "elementum enim erat eros est et etiam eu euismod ex facilisi facilisis fames faucibus felis fermentum feugiat "
    "finibus fringilla fusce gravida habitant habitasse hac hendrerit himenaeos iaculis id imperdiet in inceptos "
    "integer interdum justo lacinia lacus laoreet lectus leo libero ligula litora lobortis luctus maecenas magna "
    "magnis malesuada massa mattis mauris maximus metus mi molestie mollis montes morbi mus nam nascetur natoque nec "
    "neque netus nibh nisi nisl non nostra nulla nullam nunc odio orci ornare parturient pellentesque penatibus per "
    "pharetra phasellus placerat platea porta porttitor posuere potenti praesent pretium primis proin pulvinar purus "
    "quam quis quisque rhoncus ridiculus risus rutrum sagittis sapien scelerisque sed sem semper senectus sociosqu "
    "sodales sollicitudin suscipit suspendisse taciti tellus tempor tempus tincidunt torquent tortor tristique turpis "
    "ullamcorper ultrices ultricies urna ut varius vehicula vel velit venenatis vestibulum vitae vivamus viverra "
    "volutpat vulputate"
)
_STACK = (
    "goroutine {goroutine} [running]:\nruntime/debug.Stack()\n\t/usr/local/go/src/runtime/debug/stack.go:24 +0x65\n"
    "main.GenerateLog({pid:#x}, 0x2710, 0xc00010c060, 0xc0000a4010, 0xa)\n"
    "\t/home/builder/src/data2parquet/cmd/data-generator/main.go:104 +0x10a\n"
    "created by main.main in goroutine 1\n\t/home/builder/src/data2parquet/cmd/data-generator/main.go:41 +0x1a5\n"
)


_D2P = (
    b'{"time":"%b","level":"INFO","message":"%b","correlation-id":"%b",%b,'
    + _fields(args={name: name.replace("arg", "val") for name in sorted(f"arg{n}" for n in range(1, 11))})
    + b',"audit":true,"auto-index":true,"az":"us-east-1a","cloud-provider":"aws","device-id":"%b","duration":"%d",'
    b'"error-code":"%b","HMAC":"","http-response":"200","logger-name":"data2parquet","message-id":"%b",'
    b'"person-id":"%b","region":"us-east-1","resource-type":"ec2","session-id":"%b","source-id":"%b",%b,'
    + _fields(tags=[f"tag{n}" for n in range(1, 11)])
    + b',"thread-name":"data2parquet.main","trace-ip":["192.168.0.1","0.0.0.1"],'
    b'"transaction-message-reference":"%b","user-id":"%b"}'
)


def _d2p(count: int, rng: Random, instants: Iterator[_Instant]) -> Iterator[bytes]:
    sentence_lengths = [[max(1, round(rng.gauss(24.46, 5.08))) for _ in range(5)] for _ in range(256)]
    lorem = _LOREM_WORDS.split()
    combinations = [_combination(i) for i in range(60)]
    stacks = [_fields(stack_trace=_STACK.format(goroutine=19 + pid, pid=pid)) for pid in range(10)]
    first = -1
    for block in _blocks(count):
        n = len(block)
        characters = _random_characters(rng, 9 * _ID * n)
        draws = zip(
            block,
            range(0, len(characters), 9 * _ID),
            instants,
            rng.choices(sentence_lengths, k=n),
            rng.choices(stacks, k=n),
            strict=False,
        )
        for i, at, (now, text, ulid), lengths, stack in draws:
            if first < 0:
                first = now
            sentences = [" ".join(rng.choices(lorem, k=words)).capitalize() for words in lengths]
            ids = [ulid + characters[j : j + _ID] for j in range(at, at + 9 * _ID, _ID)]
            yield _D2P % (
                # Go's RFC3339Nano: nine digits, without the zeros at the end.
                (b"%b.%09d" % (text, now % 1_000_000_000)).rstrip(b"0").rstrip(b".") + b"Z",
                (". ".join(sentences) + ".").encode(),
                ids[0],
                combinations[i % 60],
                ids[1],
                (now - first) // 1_000_000,
                *ids[2:7],
                stack,
                *ids[7:],
            )


def _combination(i: int) -> bytes:
    return _fields(
        business_capability=f"buscap-{i % 10:02d}",
        business_domain=f"busdom-{i % 10:02d}",
        business_service=f"bussvc-{i % 20:02d}",
        application_service=f"appsvc-{i % 30:02d}",
    )


# --- records spoiled on purpose --------------------------------------------------------------------------------------

_REQUIRED = ("message", "time", "level", "business-domain", "business-service", "application-service")
_UNREADABLE = ("yesterday at noon", "2024-13-45T25:61:61Z", "", "31/12/2024 10:00", "12h30")


def _spoil(lines: Iterator[bytes], count: int, ratio: float, faults: Sequence[Fault], rng: Random) -> Iterator[bytes]:
    spoiled = 0
    for block in _blocks(count):
        places = set(rng.sample(block, round(block.stop * ratio) - round(block.start * ratio)))
        for i, line in zip(block, lines, strict=False):
            if i in places:
                turn, fault = divmod(spoiled, len(faults))
                yield _spoiled(line, faults[fault], turn, rng)
                spoiled += 1
            else:
                yield line


def _spoiled(line: bytes, fault: Fault, turn: int, rng: Random) -> bytes:
    if fault == "truncated":
        capability = _CAPABILITY.search(line)
        return line[: rng.randrange(capability.end() if capability else 1, len(line))]
    record = json.loads(line)
    if fault == "not-an-object":
        return (json.dumps(record["message"]).encode(), b"%d" % turn, b"null")[turn % 3]
    if fault == "unreadable-time":
        record["time"] = _UNREADABLE[turn % len(_UNREADABLE)]
    elif fault == "null-field":
        record[_REQUIRED[turn % len(_REQUIRED)]] = None
    else:
        del record[_REQUIRED[turn % len(_REQUIRED)]]
    return json.dumps(record, separators=(",", ":")).encode()
