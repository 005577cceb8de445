"""Where the embedded server's socket lies when its own directory has too long a name."""

from pathlib import Path

import pytest

from d2p_pipeline.buffer.connect import RedisRefusedError
from d2p_pipeline.buffer.embedded import socket_path


def test_a_socket_elsewhere_lies_in_a_directory_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = tmp_path / ("x" * 100) / "redis.sock"
    found = socket_path(wanted)
    assert found == socket_path(wanted) != socket_path(wanted.parent / "code.sock")
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert socket_path(Path("/run/d2p/redis.sock")) == Path("/run/d2p/redis.sock")

    found.parent.chmod(0o770)
    with pytest.raises(RedisRefusedError, match="not a directory of this user alone"):
        socket_path(wanted)
    found.parent.rmdir()
    found.parent.symlink_to(tmp_path)
    with pytest.raises(RedisRefusedError, match="not a directory of this user alone"):
        socket_path(wanted)
