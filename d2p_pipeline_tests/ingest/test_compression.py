"""Compressed bodies expand to what they were, piece by piece, and bombs are refused at the limits."""

import gzip
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.ingest.compression import (
    Bounds,
    CompressionError,
    ExpandedTooLargeError,
    Expansion,
    decompressed,
)

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}
BOTH = pytest.mark.parametrize("encoding", COMPRESS)


def expanded(encoding: str, parts: list[bytes], bounds: Bounds) -> bytes:
    expansion = Expansion(encoding, bounds)
    found = b"".join(piece for part in parts for piece in expansion.feed(part))
    expansion.end()
    return found


@BOTH
@given(contents=st.lists(st.binary(max_size=500), min_size=1, max_size=3), size=st.integers(1, 50))
def test_several_members_in_any_parts_are_one_body(encoding: str, contents: list[bytes], size: int) -> None:
    body = b"".join(map(COMPRESS[encoding], contents))
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    assert expanded(encoding, parts, Bounds(10_000)) == b"".join(contents)
    assert decompressed(body, encoding, 10_000) == b"".join(contents)


@BOTH
def test_a_part_that_expands_to_many_pieces_gives_all_of_them(encoding: str) -> None:
    content = b"".join(b"%d\n" % number for number in range(500_000))
    assert expanded(encoding, [COMPRESS[encoding](content)], Bounds(10_000_000)) == content
    zeros = bytes(3 << 20)
    assert expanded(encoding, [COMPRESS[encoding](zeros)], Bounds(4 << 20, ratio=100_000)) == zeros


@BOTH
@given(cut=st.integers(1, 60))
def test_a_body_that_breaks_off_is_refused(encoding: str, cut: int) -> None:
    body = COMPRESS[encoding](bytes(range(100)))
    with pytest.raises(CompressionError):
        decompressed(body[:-cut], encoding, 1000)


@BOTH
@given(body=st.binary(max_size=200))
def test_any_bytes_are_a_body_or_refused(encoding: str, body: bytes) -> None:
    try:
        assert len(decompressed(body, encoding, 10_000)) <= 10_000
    except CompressionError as error:
        assert str(error)


@BOTH
@given(content=st.binary(max_size=300), place=st.integers(0, 300), damage=st.binary(min_size=1, max_size=20))
def test_damage_is_found_or_harmless(encoding: str, content: bytes, place: int, damage: bytes) -> None:
    body = COMPRESS[encoding](content)
    damaged = body[:place] + damage + body[place + len(damage) :]
    try:
        decompressed(damaged, encoding, 10_000)
    except CompressionError as error:
        assert str(error)


@BOTH
def test_a_bomb_is_refused_after_no_more_than_the_limit(encoding: str) -> None:
    bomb = COMPRESS[encoding](bytes(200 << 20))
    expansion = Expansion(encoding, Bounds(8 << 20, ratio=1_000_000))
    taken = 0
    with pytest.raises(ExpandedTooLargeError, match="max_body_bytes"):
        for piece in expansion.feed(bomb):
            taken += len(piece)
    assert taken <= 8 << 20
    with pytest.raises(ExpandedTooLargeError, match="max_expansion"):
        expanded(encoding, [bomb], Bounds(1 << 30, ratio=50))


def test_a_window_of_gigabytes_is_refused_before_it_is_allocated() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = compressor.compress(b"x" * 1000) + compressor.flush()
    with pytest.raises(CompressionError):
        decompressed(body, "zstd", 1 << 20)


def test_nested_gzip_expands_once() -> None:
    inner = gzip.compress(b"x")
    assert decompressed(gzip.compress(inner), "gzip", 1000) == inner
    assert zlib.decompress(inner, 31) == b"x"
