import gzip
import io
import json
import tracemalloc
import zlib
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from d2p_pipeline.ingest.documents import Block, Break, Content, ForeignError, Range, blocks, ending, ranges

MB = 1 << 20


def cut(
    data: bytes, size: int = MB, longest: int = MB, window: int = MB, file: io.BufferedIOBase | None = None
) -> tuple[list[Block], str | None]:
    content = Content(file or io.BytesIO(data))
    return list(blocks(content, size, longest, window)), content.damage


def lines(found: list[Block]) -> list[bytes]:
    return [line for block in found for line in bytes(block.text).splitlines() if line]


def breaks(found: list[Block]) -> list[Break]:
    return [broken for block in found for broken in block.breaks]


class Pipe(io.RawIOBase):
    """Content that cannot be sought in, and comes a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._file = io.BytesIO(data)
        self._step = step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._file.readinto(memoryview(buffer)[: self._step])


# --- lines


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=60), st.integers(1, 80))
def test_blocks_of_lines_are_the_content_cut_after_newlines(some: list[bytes], size: int) -> None:
    data = b'{"a":1}\n' + b"\n".join(some)
    found, damage = cut(data, size)
    kept = b"".join(data[block.offset : block.offset + len(block.text)] for block in found if block.offset is not None)
    assert kept.replace(b"\n", b"").strip() == data.replace(b"\n", b"").strip()
    assert all(bytes(block.text).endswith(b"\n") for block in found[:-1])
    assert all(len(block.text) <= size or bytes(block.text[:-1]).count(b"\n") == 0 for block in found)
    assert damage is None


@given(st.binary(max_size=300), st.integers(1, 50), st.integers(1, 50))
def test_the_same_content_gives_the_same_blocks_from_whatever_it_is_read(data: bytes, size: int, step: int) -> None:
    data = b"{}\n" + data
    plain, _ = cut(data, size)
    assert list(blocks(Content(Pipe(data, step)), size, MB)) == plain
    assert cut(gzip.compress(data), size)[0] == plain
    assert cut(zstandard.ZstdCompressor().compress(data), size)[0] == plain


@given(
    st.lists(st.sampled_from([b"1", b" ", b"\n", b"\r\n", b"22", b"3" * 20, b"[", b'{"logs":[']), max_size=60),
    st.integers(1, 50),
    st.integers(1, 20),
)
def test_ranges_are_the_blocks_without_their_text(some: list[bytes], size: int, piece: int) -> None:
    data = b"".join(some)

    def text_of(block: Range) -> bytes:
        return data[block.offset : block.offset + block.size]

    expected, damage = cut(data, size, longest=30)
    content = Content(io.BytesIO(data))
    # Blank lines are passed over like any others.
    found = [
        block for block in ranges(content, size, 30, piece) if not isinstance(block, Range) or text_of(block).strip()
    ]
    assert [(block.offset, block.size, block.breaks) for block in found] == [
        (block.offset, block.size, block.breaks) for block in expected
    ]
    assert all(block.ending == ending(text_of(block)) for block in found if isinstance(block, Range))
    assert content.damage == damage
    assert content.taken == len(data)


def test_a_line_longer_than_a_block_is_a_block_of_its_own() -> None:
    found, _ = cut(b"1\n" + b"2" * 100 + b"\n3\n4\n", size=10)
    assert [bytes(block.text) for block in found] == [b"1\n", b"2" * 100 + b"\n", b"3\n4\n"]


def test_a_line_longer_than_any_record_is_no_line_and_spoils_no_other() -> None:
    found, damage = cut(b"1\n" + b"2" * 200_000 + b"\n3\n", size=10, longest=50)
    assert lines(found) == [b"1", b"3"]
    [broken] = breaks(found)
    assert broken.offset == 2
    assert "200000 bytes, more than max_record_bytes (50)" in broken.reason
    assert broken.raw == b"2" * (64 << 10)
    assert damage is None


@pytest.mark.parametrize("data", [b"", b"\n\n \r\n", b"[]", b' {"logs":[ ]}\n', b"[\n]\n[ ]"])
def test_nothing_is_no_block(data: bytes) -> None:
    assert cut(data) == ([], None)


# --- documents

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
blanks = st.text(" \t\r\n", max_size=3)


def laid_out(value: Any, blank: Any) -> str:
    """JSON with any whitespace between any two tokens."""
    if isinstance(value, dict):
        members = (f"{json.dumps(k)}{blank()}:{blank()}{laid_out(v, blank)}" for k, v in value.items())
        return f"{{{blank()}{f'{blank()},{blank()}'.join(members)}{blank()}}}"
    if isinstance(value, list):
        return f"[{blank()}{f'{blank()},{blank()}'.join(laid_out(v, blank) for v in value)}{blank()}]"
    return json.dumps(value, ensure_ascii=bool(len(blank()) % 2))


@given(st.data(), st.lists(values, max_size=12), st.sampled_from(["array", "logs"]), st.integers(1, 120))
def test_the_elements_of_a_document_are_lines_whatever_its_layout(
    data: st.DataObject, elements: list[Any], form: str, window: int
) -> None:
    text = laid_out(elements, lambda: data.draw(blanks))
    if form == "logs":
        text = f'{data.draw(blanks)}{{{data.draw(blanks)}"logs"{data.draw(blanks)}:{text}{data.draw(blanks)}}}'
    found, damage = cut(text.encode(), window=window, size=50)
    assert [
        json.loads(line) for line in b"".join(bytes(block.text) for block in found).split(b"\n") if line
    ] == elements
    assert not breaks(found)
    assert damage is None


@given(st.data(), st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=8), st.integers(1, 90))
def test_objects_over_several_lines_are_one_line_each(
    data: st.DataObject, records: list[dict[str, Any]], window: int
) -> None:
    text = "{\n}" + "".join(data.draw(blanks) + laid_out(record, lambda: data.draw(blanks)) for record in records)
    found, damage = cut(text.encode(), window=window)
    assert [json.loads(line) for line in b"".join(bytes(block.text) for block in found).split(b"\n") if line] == [
        {},
        *records,
    ]
    assert damage is None


@given(st.lists(st.fixed_dictionaries({"a": st.text(max_size=9)}), min_size=1), st.integers(1, 60), st.data())
def test_before_the_place_where_an_array_breaks_off_nothing_is_lost(
    records: list[dict[str, str]], window: int, data: st.DataObject
) -> None:
    whole = json.dumps(records).encode()
    length = data.draw(st.integers(1, len(whole) - 1))
    found, damage = cut(whole[:length], window=window)
    complete = [json.loads(line) for line in lines(found)]
    assert complete == records[: len(complete)]
    assert damage is not None
    rest = whole[:length]
    for broken in breaks(found):
        assert whole[broken.offset : length].strip() == broken.raw
        assert f"breaks off at byte {broken.offset}" in broken.reason
        rest = whole[: broken.offset]
    # What is neither an element nor kept beside them only separates elements.
    assert rest.decode().rstrip(", ") == json.dumps(complete)[:-1]


def test_a_bad_element_spoils_no_other() -> None:
    found, damage = cut(b'[{"a":1} {"b":2}, {"c":tru}, nonsense,, {"d":[}, {"e":"]},{"}]')
    assert lines(found) == [b'{"a":1} {"b":2}', b'{"c":tru}', b"nonsense"]
    assert [broken.raw for broken in breaks(found)] == [b'{"d":[}, {"e":"]},{"}]']
    assert damage


DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[%b,{"b":2},{"c":3}]' % DEEP, [DEEP, b'{"b":2}', b'{"c":3}']),
        (b'{"logs":[{"b":2},%b]}' % DEEP, [b'{"b":2}', DEEP]),
        (b'{"logs":[{"\xff":1},{"b":2}]}', [b'{"\xff":1}', b'{"b":2}']),
        (b'{"logs":[{"b":2}],"\xff":1}', [b'{"b":2}']),
    ],
    ids=["deep", "deep in logs", "no UTF-8", "no UTF-8 beside logs"],
)
def test_what_a_decoder_cannot_read_spoils_no_other_element(data: bytes, expected: list[bytes]) -> None:
    found, damage = cut(data)
    assert lines(found) == expected
    assert damage is None


def test_an_element_longer_than_any_record_breaks_the_document_off_in_bounded_memory() -> None:
    found, damage = cut(b'[{"a":1},{"b":"' + b"x" * 300_000 + b'"}]', longest=1000, window=100)
    assert lines(found) == [b'{"a":1}']
    [broken] = breaks(found)
    assert len(broken.raw) <= 64 << 10
    assert "of the 300009 bytes that follow" in broken.reason
    assert damage == "the array breaks off at byte 9"


def test_a_newline_within_a_string_stays_an_error() -> None:
    found, _ = cut(b'[{"a":"x\ny"}]')
    assert lines(found)[0].startswith(b'{"a":"x')
    with pytest.raises(ValueError, match="control character"):
        json.loads(bytes(found[0].text))


def test_a_first_record_with_a_field_called_logs_is_a_record() -> None:
    data = b'{"logs":["a"],"level":"info"}\n{"b":1}\n'
    assert lines(cut(data)[0]) == data.splitlines()


def test_members_beside_logs_are_kept_as_no_record() -> None:
    found, damage = cut(b'{"logs":[{"a":1}],\n"version":[2]}\n{"b":1}\n')
    assert lines(found) == [b'{"a":1}', b'{"b":1}']
    assert [broken.raw for broken in breaks(found)] == [b',\n"version":[2]']
    assert damage is None


def test_documents_and_lines_may_follow_each_other() -> None:
    found, damage = cut(b'\xef\xbb\xbf[1,2]\n[3]{"logs":[4]}\n{"a":1}\n{"b":2}')
    assert lines(found) == [b"1", b"2", b"3", b"4", b'{"a":1}', b'{"b":2}']
    assert damage is None


def test_delimiters_in_nested_arrays_and_in_strings_are_not_taken_for_elements_ends() -> None:
    record = {"items": [{"n": n} for n in range(40)], "text": '},{"a":[\\"' * 5}
    found, _ = cut(json.dumps([record] * 50).encode(), window=500)
    assert [json.loads(line) for line in lines(found)] == [record] * 50


# --- compression and damage


def test_concatenated_compressed_parts_are_one_content() -> None:
    frames = zstandard.ZstdCompressor()
    skippable = b"\x51\x2a\x4d\x18\x03\x00\x00\x00abc"
    assert lines(cut(gzip.compress(b"1\n") + gzip.compress(b"2\n"))[0]) == [b"1", b"2"]
    assert lines(cut(skippable + frames.compress(b"1\n") + frames.compress(b"2\n"))[0]) == [b"1", b"2"]


def test_what_expands_a_thousandfold_is_taken_little_by_little() -> None:
    expanding = zstandard.ZstdCompressor().compressobj()
    data = b"".join([*(expanding.compress(bytes(MB)) for _ in range(128)), expanding.flush()])
    content = Content(io.BytesIO(data))
    tracemalloc.start()
    try:
        assert sum(iter(lambda: len(content.read(MB)), 0)) == 128 * MB
        assert tracemalloc.get_traced_memory()[1] < 96 * MB
    finally:
        tracemalloc.stop()


def test_a_bracket_that_closes_nothing_goes_with_what_comes_next() -> None:
    found, _ = cut(b'{\n"a":1}\n]\n{\n"b":2}\n{\n"c":3}')
    assert bytes(found[0].text) == b'{\r"a":1}\n]\r{\r"b":2}\n{\r"c":3}\n'
    found, _ = cut(b'{\n"a":1}\n]')
    assert [broken.raw for broken in breaks(found)] == [b"]"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_what_comes_before_damage_is_kept_and_the_damage_told(compress: Any) -> None:
    data = b"".join(b'{"n":%d,"x":"%d"}\n' % (n, zlib.crc32(b"%d" % n)) for n in range(200_000))
    packed = compress(data)
    found, damage = cut(packed[: len(packed) // 2])
    kept = b"".join(bytes(block.text) for block in found)
    assert damage is not None
    assert data.startswith(kept)
    assert len(kept) > len(data) // 3


def test_a_corrupt_end_of_gzip_loses_nothing_before_it() -> None:
    data = b'{"a":1}\n' * 1000
    found, damage = cut(gzip.compress(data)[:-8] + b"\0" * 8)
    assert b"".join(bytes(block.text) for block in found) == data
    assert damage is not None
    assert "CRC" in damage


@pytest.mark.parametrize(
    ("data", "what"),
    [(b"PAR1....", "Parquet"), (b"PK\x03\x04..", "ZIP"), (b"BZh91AY", "bzip2"), ('{"a":1}'.encode("utf-16"), "UTF-16")],
)
def test_what_is_no_json_text_is_refused_by_its_first_bytes(data: bytes, what: str) -> None:
    with pytest.raises(ForeignError, match=what):
        cut(data)
