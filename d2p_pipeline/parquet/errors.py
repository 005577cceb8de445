"""Why a store could not do what it was asked, told apart by whether the same request can succeed later.

`TransientStoreError`: nobody has to do anything, ask again. `PermanentStoreError`: someone has to change something first.
After either, the same `write` may be repeated: it replaces whatever an earlier attempt left.
"""


class StoreError(Exception):
    """`doing` something to `target` (a URL) failed because of `reason`; `advice` says what to do about it, if anything.

    `code` is the service's name for the error, or the exception's; `status` the HTTP status, None when no answer came.
    """

    def __init__(self, doing: str, target: str, code: str, status: int | None, reason: str, advice: str = "") -> None:
        super().__init__(doing, target, code, status, reason, advice)
        self.doing = doing
        self.target = target
        self.code = code
        self.status = status
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        status = f" ({self.status})" if self.status else ""
        reason = f": {self.reason.rstrip('. ')}" if self.reason else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"cannot {self.doing} {self.target}: {self.code}{status}{reason}{advice}"


class TransientStoreError(StoreError):
    """Throttling, a server's failure, a timeout, a broken connection."""


class PermanentStoreError(StoreError):
    """A missing right or bucket, unusable credentials, a wrong setting, a wrong clock."""
