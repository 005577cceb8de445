"""A few schedules of faults; `make soak` runs as many as wanted."""

from collections.abc import Iterator

import pytest

from d2p_pipeline_tests.faults.schedule import schedule
from d2p_pipeline_tests.faults.world import World

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"), "newer")
    yield world
    world.close()


@pytest.mark.parametrize("seed", [5, 11])
def test_the_books_balance_after_a_schedule_of_faults(world: World, seed: int) -> None:
    books = world.run(schedule(seed))
    assert books.balance, books
    assert books.accepted > 0
    assert books.struck
    assert books.accepted <= books.rows + books.dead_letters <= books.accepted + books.unknown
