"""Delivers lines to an SQS queue, several a message."""

from collections.abc import Callable, Iterable
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from d2p_pipeline.ingest.delivering import Answer, Busy, Sent, batches, deliver

MESSAGE_BYTES = 250_000
"""Below what SQS ever allowed for a message and for a call."""


def send(
    lines: Iterable[bytes],
    client: Any,
    url: str,
    *,
    batch: int = 100,
    connections: int = 4,
    patience: float = 60.0,
    on_progress: Callable[[int], object] = lambda records: None,
) -> Sent:
    """Send `lines` to the queue `url`, at most `batch` of them a message, with `connections` calls at a time.

    SQS has no name for a message that a standard queue would recognise: one whose call was not answered may be there twice.
    Raises Undelivered as `deliver` does.
    """

    remaining: dict[str, list[bytes]] = {}

    def post(part: list[bytes], name: str) -> Answer:
        # A repetition sends what the attempt before it did not.
        rest = remaining.setdefault(name, list(part))
        while rest:
            body, number = _body(rest)
            try:
                client.send_message(QueueUrl=url, MessageBody=body)
            except (BotoCoreError, ClientError) as error:
                raise Busy(str(error)) from error
            del rest[:number]
        del remaining[name]
        return Answer(len(part))

    return deliver(
        batches(lines, batch), url, [post] * connections, transient=(), patience=patience, on_progress=on_progress
    )


def _body(lines: list[bytes]) -> tuple[str, int]:
    """As many lines as a message takes, at least one, and how many that is."""
    size, number = 0, 0
    while number < len(lines) and (number == 0 or size + len(lines[number]) < MESSAGE_BYTES):
        size += len(lines[number]) + 1
        number += 1
    return b"\n".join(lines[:number]).decode("utf-8", "replace"), number
