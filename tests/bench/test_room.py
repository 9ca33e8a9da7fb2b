from tests.bench.growth.room import MOST_WORKERS, Room, rooms

LEVELS = (1, 10, 100, 1_000, 10_000, 20_000)
MUCH = 16 << 20  # KiB


def test_one_process_is_enough_where_it_may_have_the_descriptors() -> None:
    (room,) = rooms(20_000, 65_536, MUCH)
    assert room == Room(65_536, MUCH, 1)
    assert room.reachable(LEVELS) == list(LEVELS)
    assert room.missed(LEVELS) == ""


def test_where_one_process_may_not_there_are_as_many_workers_as_it_takes() -> None:
    one, several = rooms(20_000, 20_000, MUCH)
    assert one.reachable(LEVELS) == [1, 10, 100, 1_000, 9_836]
    assert one.missed(LEVELS) == (
        "Not reached: 10,000, 20,000, for a process may have 20,000 descriptors here (`ulimit -Hn`), and a sidecar of "
        "one process needs two for each connection."
    )
    assert several.workers == 3
    assert several.reachable(LEVELS) == list(LEVELS)
    assert Room(20_000, MUCH, 2).by_files < 20_000


def test_workers_leave_room_for_one_of_them_having_more_than_its_part() -> None:
    one, four = Room(2_000, MUCH), Room(2_000, MUCH, 4)
    assert one.by_files < four.by_files < 4 * one.by_files


def test_even_as_many_workers_as_there_may_be_can_be_too_few_and_it_is_said() -> None:
    one, most = rooms(20_000, 1024, MUCH)
    assert (one.workers, most.workers) == (1, MOST_WORKERS)
    assert most.reachable(LEVELS) == [1, 10, 100, 1_000, most.by_files]
    assert f"1,024 descriptors here (`ulimit -Hn`), and a sidecar of {MOST_WORKERS} workers" in most.missed(LEVELS)


def test_memory_is_a_limit_too_and_named_when_it_is_the_nearer_one() -> None:
    room = Room(65_536, 1 << 20)
    assert room.reachable(LEVELS) == [1, 10, 100, 1_000, 4_096]
    assert room.missed(LEVELS) == "Not reached: 10,000, 20,000, for 1,024 MiB are free, and half of them are ours."


def test_nothing_is_reachable_where_there_is_no_room_at_all() -> None:
    room = Room(100, MUCH)
    assert room.reachable(LEVELS) == []
    assert room.missed(LEVELS).startswith("Not reached: 1, 10, 100, 1,000, 10,000, 20,000, for a process")
