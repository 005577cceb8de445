"""Reading `time`: the text or number a producer sent becomes RFC 3339 text that the bulk decoder reads, or is rejected.

RFC 3339 text stays as it is, whatever its offset and precision (the decoder truncates it to `timestamp_unit`). Epoch
numbers become UTC text with the precision they came with, down to a nanosecond.
"""

import datetime
import re
from decimal import ROUND_FLOOR, Decimal
from functools import cache
from typing import Annotated

import msgspec

from d2p_pipeline.records.dead_letter import Rejected
from d2p_pipeline.records.fields import TimestampUnit

# The colon of the offset may be missing, as Java and Python loggers write it. Group 1 ends where more precision than
# a datetime's begins, group 2 is the offset.
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,6})?)\d*([Zz]|[+-]\d\d:?\d\d)", re.ASCII)
_NAIVE = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d([.,]\d+)?)?)?", re.ASCII)
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d{1,4})?", re.ASCII)

# Converting decimal digits takes time quadratic in their number.
_LONGEST_NUMBER = 100

# Largest magnitude read as s, ms, µs, ns, with the digits from there to ns. Seconds reach the year 5138; the same
# moments in ms, µs and ns are a thousand times larger each, so today's times are unambiguous.
_EPOCH_UNITS = ((Decimal(10) ** 11, 9), (Decimal(10) ** 14, 6), (Decimal(10) ** 17, 3), (Decimal(10) ** 20, 0))

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_AwareDatetime = Annotated[datetime.datetime, msgspec.Meta(tz=True)]


@cache
def first_and_last(unit: TimestampUnit) -> tuple[datetime.datetime, datetime.datetime]:
    """The first and the last moment that can be stored: the years of the calendar, or those that 64 bits of ns cover."""
    if unit == "ns":
        first, last = datetime.datetime(1678, 1, 1), datetime.datetime(2261, 12, 31, 23, 59, 59, 999999)
    else:
        first, last = datetime.datetime.min, datetime.datetime.max
    return first.replace(tzinfo=datetime.UTC), last.replace(tzinfo=datetime.UTC)


def certain_years(unit: TimestampUnit) -> tuple[int, int]:
    """First and last local year in which a time with whatever offset can be stored."""
    first, last = first_and_last(unit)
    return first.year + 1, last.year - 1


def canonical_time(text: str, unit: TimestampUnit) -> str:
    """RFC 3339 text for RFC 3339 text, or for epoch s, ms, µs or ns told apart by magnitude. Rejected for all else."""
    if len(text) < _LONGEST_NUMBER and _NUMBER.fullmatch(text):
        moment, canonical = _from_epoch(text)
    elif parts := _RFC3339.fullmatch(text):
        moment, canonical = _from_rfc3339(text, parts[1] + parts[2]), text
    elif _NAIVE.fullmatch(text):
        raise Rejected(f"time: {_shown(text)} has no offset from UTC; add Z or +hh:mm", "time")
    else:
        raise Rejected(f"time: {_shown(text)} is neither RFC 3339 nor an epoch number", "time")
    first, last = first_and_last(unit)
    if not first <= moment <= last:
        raise Rejected(
            f"time: {_shown(text)} is outside the years {first.year} to {last.year} that can be stored", "time"
        )
    return canonical


def _from_rfc3339(text: str, microsecond_text: str) -> datetime.datetime:
    try:
        return msgspec.convert(microsecond_text, _AwareDatetime)
    except msgspec.ValidationError:
        raise Rejected(f"time: {_shown(text)} does not exist in the calendar or on the clock", "time") from None


def _from_epoch(text: str) -> tuple[datetime.datetime, str]:
    number = Decimal(text)
    for limit, digits_to_ns in _EPOCH_UNITS:
        if number.copy_abs() < limit:
            whole_ns = number.quantize(Decimal(1).scaleb(-digits_to_ns), ROUND_FLOOR).scaleb(digits_to_ns)
            seconds, nanoseconds = divmod(int(whole_ns), 10**9)
            break
    else:
        raise Rejected(f"time: {_shown(text)} is too large for an epoch time, even in nanoseconds", "time")
    try:
        moment = _EPOCH + datetime.timedelta(seconds=seconds)
    except OverflowError:
        raise Rejected(f"time: {_shown(text)} is outside the years that can be stored", "time") from None
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return moment, f"{moment.isoformat()[:19]}{fraction}Z"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
