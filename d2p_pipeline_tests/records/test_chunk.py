import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.records import chunk
from d2p_pipeline.records.chunk import Chunk, ChunkError
from d2p_pipeline_tests.records.builders import line

OURS = chunk.encode([line(message=str(number)) for number in range(100)], received_at_ms=1_700_000_000_000)


@given(
    st.lists(st.binary().map(lambda data: data.replace(b"\n", b"")), min_size=1), st.integers(0, 253_402_300_799_999)
)
def test_a_chunk_tells_its_lines_their_number_and_when_they_came(lines, received_at) -> None:
    body = b"".join(entry + b"\n" for entry in lines)
    encoded = chunk.encode(lines, received_at)
    assert chunk.decode(encoded) == Chunk(body, canonical=True, records=len(lines), received_at=received_at)
    assert chunk.raw_size(encoded) == len(body)


def test_any_zstd_reader_reads_a_chunk() -> None:
    with zstandard.ZstdDecompressor().stream_reader(OURS, read_across_frames=True) as reader:
        assert reader.read() == chunk.decode(OURS).body


def test_plain_text_is_itself_and_not_known_to_be_canonical() -> None:
    assert chunk.decode(line()) == Chunk(line(), canonical=False, records=None, received_at=None)
    assert chunk.raw_size(line()) == len(line())
    assert chunk.decode(b"").body == b""


@pytest.mark.parametrize("sized", [True, False])
def test_foreign_zstd_is_read_and_not_known_to_be_canonical(sized) -> None:
    foreign = zstandard.ZstdCompressor(write_content_size=sized).compress(b"x" * 100_000)
    assert chunk.decode(foreign) == Chunk(b"x" * 100_000, canonical=False, records=None, received_at=None)
    assert chunk.raw_size(foreign) == (100_000 if sized else len(foreign) * 8)


def test_foreign_frames_in_a_row_are_one_chunk() -> None:
    frame = zstandard.ZstdCompressor().compress(b"abc\n")
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"pzst"
    assert chunk.decode(skippable + frame + frame).body == b"abc\nabc\n"


@given(st.integers(0, len(OURS) - 1))
def test_no_truncated_chunk_is_taken_for_a_whole_one(length) -> None:
    truncated = OURS[:length]
    try:
        decoded = chunk.decode(truncated)
    except ChunkError as error:
        assert error.size == length
    else:
        assert not decoded.canonical
        assert length < 12
        assert decoded.body == truncated


@pytest.mark.parametrize("sized", [True, False])
def test_a_truncated_foreign_frame_is_an_error(sized) -> None:
    foreign = zstandard.ZstdCompressor(write_content_size=sized).compress(b"abc" * 1000)
    with pytest.raises(ChunkError, match="middle of a zstd frame"):
        chunk.decode(foreign[:-1])


@given(st.integers(0, len(OURS) - 1), st.integers(1, 255))
def test_a_damaged_chunk_is_an_error_or_reads_as_whole_lines(position, flip) -> None:
    damaged = bytearray(OURS)
    damaged[position] ^= flip
    try:
        decoded = chunk.decode(bytes(damaged), limit=1 << 20)
    except ChunkError:
        return
    assert len(decoded.body) <= 1 << 20


def test_a_newer_format_is_refused_with_its_version() -> None:
    newer = bytearray(OURS)
    newer[11] = 9
    with pytest.raises(ChunkError, match="format version 9"):
        chunk.decode(bytes(newer))
    assert chunk.raw_size(bytes(newer)) == len(newer)


@pytest.mark.parametrize("sized", [True, False])
def test_a_chunk_larger_than_the_limit_is_refused_before_it_fills_memory(sized) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=sized).compress(bytes(1 << 26))
    with pytest.raises(ChunkError, match="more than the 1000 bytes"):
        chunk.decode(bomb, limit=1000)
    with pytest.raises(ChunkError, match="more than the 1000 bytes"):
        chunk.decode(OURS, limit=1000)


def test_a_time_of_reception_that_no_dead_letter_could_tell_is_damage() -> None:
    with pytest.raises(ChunkError, match="damaged"):
        chunk.decode(chunk.encode([line()], 253_402_300_800_000))


def test_bytes_after_the_frame_are_not_swallowed() -> None:
    with pytest.raises(ChunkError):
        chunk.decode(OURS + b"more")


def test_a_chunk_has_at_least_one_line() -> None:
    with pytest.raises(ValueError, match="at least one line"):
        chunk.encode([], 0)
