"""Six schedules of faults, in which every kind is drawn; `make soak` runs as many as wanted."""

from collections.abc import Iterator

import pytest

from d2p_pipeline_tests.faults.producers import Producer
from d2p_pipeline_tests.faults.schedule import KINDS, schedule
from d2p_pipeline_tests.faults.world import World

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"), "newer")
    yield world
    world.close()


SEEDS = [5, 553, 1099, 3397, 3437, 3847]


def test_every_kind_of_fault_is_drawn() -> None:
    assert {fault.kind for seed in SEEDS for fault in schedule(seed).faults} == set(KINDS)


class Telling(Producer):
    """Sends nowhere, and is told one outcome of all."""

    def __init__(self, outcome: str) -> None:
        super().__init__("p", 5)
        self.outcome, self.sent = outcome, list[bytes]()

    def send(self, name: str, body: bytes, key: str) -> str:
        self.sent.append(body)
        return self.outcome


def test_a_seed_sends_the_same_records_whatever_becomes_of_them() -> None:
    producers = [Telling("accepted"), Telling("unknown")]
    for producer in producers:
        producer.start()
        for _ in range(2):
            producer.give_leave(20)
        producer.finish(40)
        producer.stop()
    one, other = (producer.sent for producer in producers)
    assert one == other
    assert len(one) == 40


@pytest.mark.parametrize("seed", SEEDS)
def test_the_books_balance_after_a_schedule_of_faults(world: World, seed: int) -> None:
    books = world.run(schedule(seed))
    assert books.balance, books
    assert books.accepted > 0
    assert books.struck
    assert books.accepted <= books.rows + books.dead_letters <= books.accepted + books.unknown
