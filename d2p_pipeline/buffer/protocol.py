"""The values of the delivery protocol and what every buffer does; see the package's docstring for the steps.

Times are milliseconds since the epoch by the buffer's own clock (`now`), so that hosts need not agree on theirs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

Reason = Literal["size", "bytes", "age", "request", "schedule", "replay"]
"""Why a buffer was sealed."""


State = Literal["open", "recovery", "done"]
"""Open: a run is to deliver it. Recovery: its delivery failed after all retries, and it waits for another attempt."""


class Push(msgspec.Struct, frozen=True):
    """What one commit adds to one key: a chunk with its number of records and size in raw bytes, or dead letters, or both.

    `id` makes the push's second arrival a no-op for `window` seconds. `rejected` counts the records behind `dead_letters`,
    which is empty where dead letters are not kept.
    """

    key: str
    id: str
    window: int
    chunk: bytes = b""
    records: int = 0
    size: int = 0
    rejected: int = 0
    dead_letters: Sequence[bytes] = ()


class BufferState(msgspec.Struct, frozen=True):
    """A key's waiting records. Chunks of a producer that pushes by itself count as one record each, of estimated size."""

    key: str
    records: int
    size: int
    chunks: int
    first: int
    counted: int = 0
    """The records among them that `push` counted."""


class Batch(msgspec.Struct, frozen=True):
    """A sealed buffer. `token` counts the claims so far, `requests` the runs asked for; `failed_token` is that of the claim
    under which it failed last: where it is behind `token`, a later claim came to nothing or still holds."""

    key: str
    id: str
    state: State
    reason: str
    sealed_at: int
    first: int
    chunks: int
    records: int
    size: int
    counted: bool
    """Whether every chunk was pushed through `push`, so that `records` and `size` are the whole truth."""
    token: int
    requests: int
    units_done: frozenset[int]
    rows: int
    dead_letters: int
    plan: tuple[tuple[int, int], ...] | None = None
    failures: int = 0
    failed_at: int = 0
    failed_token: int = 0
    error: str = ""
    format: int = 1
    """Above `FORMAT`: only a later version can deliver it."""

    @property
    def ref(self) -> "BatchRef":
        return BatchRef(self.key, self.id)


class BatchRef(NamedTuple):
    """What names a batch; small enough for run configuration."""

    key: str
    id: str


class Seal(NamedTuple):
    """An order to seal: the batch's id is chosen before, so that the order may arrive twice."""

    key: str
    batch_id: str
    reason: Reason


class Claim(msgspec.Struct, frozen=True):
    """The right to deliver a batch, until a later claim's higher token."""

    batch: BatchRef
    owner: str
    token: int


class Announcement(msgspec.Struct, frozen=True):
    """The files that an attempt at a unit is about to write."""

    claim: Claim
    unit: int
    files: Mapping[str, str]
    """Path to MD5 of the content."""
    own: bool = False
    """The names are this claim's alone: no other attempt ever uses them."""


class Totals(msgspec.Struct, frozen=True):
    """What became of a key's records: accepted = rows + dead_letters + discarded + what still waits."""

    accepted: int
    rows: int
    dead_letters: int
    discarded: int = 0


class Deliveries(msgspec.Struct, frozen=True):
    """What a key's deliveries came to. `delivery_ms`: from seal to acknowledgement, added up over the units."""

    files: int = 0
    file_bytes: int = 0
    units: int = 0
    delivery_ms: int = 0
    failures: int = 0
    """How often a batch went into recovery."""
    sealed: dict[str, int] = {}
    """Batches by the reason they were sealed for."""


class ClaimLostError(Exception):
    """Another run has taken the batch since: this one's work must not be acknowledged."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        super().__init__(
            f"batch {claim.batch.id} of key {claim.batch.key!r}: token {claim.token} is stale, another run has taken the batch; "
            "it delivers what this run could not acknowledge"
        )


FORMAT = 1
"""Of batches in Redis. Grows when an earlier version could no longer deliver what this one seals."""


class NewerFormatError(Exception):
    """A later version sealed the batch; it stays as it is."""

    def __init__(self, ref: BatchRef, found: int) -> None:
        super().__init__(
            f"batch {ref.id} of key {ref.key!r} was sealed by a later version: it has format {found}, this version knows up to "
            f"{FORMAT}; upgrade this process, nothing is lost meanwhile"
        )


class BufferFullError(Exception):
    """The buffer can take no more for now; nothing of this push was stored."""


class BufferUnavailableError(Exception):
    """The buffer does not answer, or refuses to work; what was asked may or may not have happened, and may be asked again."""


class ForeignValueError(Exception):
    """Another program's value has a name of ours; nothing of this push was stored."""


class PartlyStoredError(ForeignValueError):
    """On a Cluster, where keys are stored one by one: the pushes of some keys were refused, those of the others stored."""

    def __init__(self, refused: "Mapping[str, ForeignValueError]") -> None:
        super().__init__("; ".join(map(str, refused.values())) + "; what has other keys was stored")
        self._refused = refused

    def of(self, keys: set[str]) -> ForeignValueError | None:
        """What it means to whom only some of the keys matter."""
        refused = {key: error for key, error in self._refused.items() if key in keys}
        if refused and len(refused) < len(keys):
            return PartlyStoredError(refused)
        return next(iter(refused.values()), None)


class Buffer(Protocol):
    """Buffers, batches and dead letters of all keys."""

    def now(self) -> int:
        """The buffer's clock."""
        ...

    def push(self, pushes: Sequence[Push]) -> None:
        """Store all of `pushes`; raise `BufferFullError` or `ForeignValueError` with nothing stored."""
        ...

    async def push_async(self, pushes: Sequence[Push]) -> None:
        """`push` for an event loop, always the same one."""
        ...

    async def end_async(self) -> None:
        """No more `push_async` comes."""
        ...

    def check_writable(self) -> None:
        """Write a trifle; raises what `push` would."""
        ...

    def request_flush(self, keys: Iterable[str] | None = None) -> list[str]:
        """Make keys (default: all that wait) due at once; returns those that have records."""
        ...

    def due(self, before: int, limit: int) -> list[BufferState]:
        """Buffers that are full, asked for, or began before `before`, and that no run attends; oldest first. May contain
        empty ones."""
        ...

    def due_among(self, keys: Sequence[str], before: int) -> list[BufferState]:
        """Those of `keys` that are due, attended or not."""
        ...

    def attend(self, keys: Sequence[str], until: int) -> None:
        """A run looks after these keys until then: nobody else needs to find them due. A hint, no right to anything."""
        ...

    def leave(self, keys: Sequence[str]) -> None:
        """The run that attended these keys ends."""
        ...

    def lives(self, run: str, until: int) -> None:
        """A run says that it lives, and that it will say so again before then."""
        ...

    def ends(self, run: str) -> None:
        """A run says that it ends, or somebody has seen that it has."""
        ...

    def silent(self, since: int) -> dict[str, int]:
        """Runs that should have said before `since` that they live, and until when they said so."""
        ...

    def waiting(self) -> Iterator[BufferState]:
        """Every buffer with records, in no order; costs what exists, not what is due."""
        ...

    def seal(self, seals: Sequence[Seal], *, look_in: int = 0) -> list[Batch]:
        """Turn buffers into batches, due for delivery in `look_in` ms; those that are empty give none."""
        ...

    def batch(self, ref: BatchRef) -> Batch | None:
        """What is known of a batch; None when it was delivered over an hour ago or never existed."""
        ...

    def due_batches(self, before: int, limit: int) -> list[Batch]:
        """Open batches whose next look is due; oldest first."""
        ...

    def open_batches(self) -> Iterator[Batch]:
        """Every batch not yet delivered, in no order."""
        ...

    def postpone(self, looks: Mapping[BatchRef, int], *, requested: bool = False) -> None:
        """Look at batches again at those times; `requested`: because a run was asked for."""
        ...

    def is_claimed(self, ref: BatchRef) -> bool:
        """Whether a lease on the batch is alive."""
        ...

    def claimed(self, refs: Sequence[BatchRef]) -> set[BatchRef]:
        """Those of `refs` with a lease that is alive."""
        ...

    def claim(self, ref: BatchRef, owner: str, lease_ms: int) -> Claim | None:
        """Take an open batch nobody holds; the same owner taking it again gets the same claim."""
        ...

    def renew(self, claim: Claim, lease_ms: int) -> bool:
        """Extend the lease; False when the claim is lost or the batch delivered."""
        ...

    def release(self, claim: Claim) -> None:
        """Give the batch back."""
        ...

    def fail(self, claim: Claim, error: str) -> int:
        """Put the batch into recovery and give it back; returns how often it has failed, 0 when it is no longer ours."""
        ...

    def recovering(self, before: int | None = None) -> Iterator[Batch]:
        """Batches in recovery, oldest next attempt first; `before`: those whose next attempt is due."""
        ...

    def retry_at(self, ref: BatchRef, when: int | None, *, requested: bool = False) -> None:
        """When a batch in recovery is looked at next; None: when a person says so. `requested`: a run was asked for."""
        ...

    def plan(self, ref: BatchRef, units: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...] | None:
        """Store the unit plan, half-open ranges of chunks, unless there is one; returns the one in force."""
        ...

    def read(self, ref: BatchRef, start: int, stop: int) -> list[bytes]:
        """Chunks `start` to `stop` (exclusive) of a batch."""
        ...

    def announce(self, announcements: Sequence[Announcement]) -> list[list[str] | None]:
        """Say what is about to be written; raises `ClaimLostError`.

        Returns, for each, the paths that earlier attempts announced and it does not: they must be gone before the
        acknowledgement. None: an earlier attempt, perhaps only paused, may yet write other content under one of its paths, or
        remove it; choose names of its own.
        """
        ...

    def announced(self, ref: BatchRef, unit: int) -> Mapping[str, str] | None:
        """The files of the newest attempt at a unit; None where nobody knows (any more)."""
        ...

    def acknowledge(
        self,
        claim: Claim,
        unit: int,
        *,
        units: int,
        rows: int,
        rejected: int = 0,
        dead_letters: Sequence[bytes] = (),
        files: Sequence[int] = (),
    ) -> Literal["complete", "marked", "repeated"]:
        """Mark a unit of `units` delivered, in files of these sizes; raises `ClaimLostError`."""
        ...

    def dead_letters(self, key: str, start: int = 0, stop: int | None = None) -> list[bytes]:
        """Dead letters `start` to `stop` (exclusive; None: the last) of a key's queue, oldest first."""
        ...

    def dead_letter_keys(self) -> Iterator[tuple[str, int]]:
        """Keys that have dead letters in their queues, with how many."""
        ...

    def totals(self) -> Iterator[tuple[str, Totals]]:
        """Every key ever seen, with its totals."""
        ...

    def deliveries(self) -> Iterator[tuple[str, Deliveries]]:
        """Every key ever seen, with what its deliveries came to."""
        ...

    def reconcile(self, budget_ms: int) -> int:
        """Adopt buffers and batches that no index knows, for about that long (a process's first pass may cost more), going
        on where the last call stopped; returns what it adopted."""
        ...

    def close(self) -> None: ...
