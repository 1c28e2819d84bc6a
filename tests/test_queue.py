"""The queue of a run: which process works on which batch, which may help, and what follows a failure or a death."""

from contextlib import closing

import pytest

from datasetdm_fast.runs.workers.queue import DIED, NOT_FINITE, Owner, WorkQueue

pytestmark = pytest.mark.core

FIRST, OTHER, BESIDE = Owner("first", 0, "here", 7), Owner("other", 1), Owner("beside", 1)  # two in place 1
AT_ONCE = -1.0  # seconds: a batch may be helped as soon as it is begun


@pytest.fixture
def queue():
    """Batches 4, 2 and 9 in this order, for two places."""
    with_batches = WorkQueue()
    with with_batches.alone():
        with_batches.fill([4, 2, 9], last=99)
    with_batches.enter(FIRST)
    with_batches.enter(OTHER)
    yield with_batches
    with_batches.close()


def test_batches_are_taken_in_their_order_and_once(queue):
    assert [queue.take(owner) for owner in (FIRST, OTHER, FIRST, OTHER)] == [4, 2, 9, None]


def test_an_empty_queue_is_not_over_before_it_is_filled():
    queue = WorkQueue()
    assert queue.last() is None and not queue.is_over() and queue.take(FIRST) is None and queue.owners() == {}
    with queue.alone():
        queue.fill([], last=0)
    assert queue.last() == 0 and queue.is_over()


def test_a_run_is_over_when_its_last_batch_is_committed(queue):
    assert queue.last() == 99
    for batch in (4, 2, 9):
        assert not queue.is_over()
        queue.take(FIRST)
        assert not queue.is_over() and queue.finish(batch)
    assert queue.is_over() and queue.take(FIRST) is None


def test_the_first_of_two_to_commit_a_batch_is_told_so(queue):
    queue.take(FIRST)
    assert queue.help(OTHER, AT_ONCE) == 4
    assert queue.finish(4) and not queue.finish(4)
    assert queue.help(OTHER, AT_ONCE) is None and queue.take(OTHER) == 2


def test_only_the_batch_of_another_without_a_helper_is_helped(queue):
    assert queue.help(OTHER, AT_ONCE) is None  # nobody has begun one
    queue.take(FIRST), queue.take(FIRST), queue.take(OTHER)
    assert queue.help(OTHER, 60) is None  # begun just now
    assert queue.help(OTHER, AT_ONCE) == 4
    assert [queue.help(FIRST, AT_ONCE) for _ in range(2)] == [9, None]
    assert [queue.help(BESIDE, AT_ONCE) for _ in range(2)] == [2, None]


def test_a_helper_that_leaves_makes_room_for_another(queue):
    queue.take(FIRST)
    queue.help(OTHER, AT_ONCE)
    assert queue.leave(OTHER) == 0 and queue.help(BESIDE, AT_ONCE) == 4


def test_a_failed_batch_goes_to_a_place_that_has_not_failed_it(queue):
    queue.take(FIRST)
    queue.give_back(4, FIRST, NOT_FINITE)
    assert queue.take(FIRST) == 2  # batches that have not failed come first
    assert queue.take(FIRST, is_fresh=False) is None and queue.take(BESIDE, is_fresh=False) == 4
    assert queue.take(BESIDE, is_fresh=False) is None
    assert [queue.help(FIRST, AT_ONCE) for _ in range(2)] == [4, None]


def test_a_batch_that_failed_everywhere_goes_to_any_place(queue):
    for owner in (FIRST, BESIDE):
        assert queue.take(owner, is_fresh=owner is FIRST) == 4
        queue.give_back(4, owner, NOT_FINITE)
    assert queue.take(FIRST, is_fresh=False) == 4
    queue.give_back(4, FIRST, DIED)
    assert queue.failures(4, NOT_FINITE) == [0, 1] and queue.failures(4, DIED) == [0] and queue.failures(2, DIED) == []


def test_a_place_that_is_given_up_is_not_waited_for(queue):
    queue.take(FIRST)
    queue.give_back(4, FIRST, DIED)
    assert queue.take(FIRST, is_fresh=False) is None
    queue.leave(OTHER)
    assert queue.owners() == {FIRST: 0} and queue.take(FIRST, is_fresh=False) == 4


def test_a_fresh_batch_never_failed_before(queue):
    queue.take(FIRST)
    queue.give_back(4, FIRST, DIED)
    assert [queue.take(OTHER) for _ in range(3)] == [2, 9, None]


def test_a_batch_that_is_given_back_has_no_helper_left(queue):
    queue.take(FIRST)
    queue.help(OTHER, AT_ONCE)
    queue.give_back(4, FIRST, NOT_FINITE)
    assert queue.help(OTHER, AT_ONCE) is None and queue.take(OTHER, is_fresh=False) == 4
    assert queue.help(FIRST, AT_ONCE) == 4


def test_a_committed_batch_is_not_made_again_whatever_its_maker_says_later(queue):
    queue.take(FIRST)
    queue.finish(4)
    queue.give_back(4, FIRST, DIED)
    assert queue.leave(FIRST, DIED) == 0 and queue.failures(4, DIED) == [0]
    assert queue.take(OTHER, is_fresh=False) is None and queue.take(OTHER) == 2


def test_a_death_frees_the_batches_of_that_process_alone(queue):
    queue.take(FIRST), queue.take(OTHER), queue.take(FIRST)
    assert queue.leave(FIRST, DIED) == 2
    assert queue.failures(4, DIED) == queue.failures(9, DIED) == [0] and queue.failures(2, DIED) == []
    assert [queue.help(FIRST, AT_ONCE) for _ in range(2)] == [2, None] and queue.owners() == {OTHER: 0}
    assert queue.take(OTHER, is_fresh=False) == 4


def test_leaving_in_peace_fails_nothing(queue):
    queue.take(FIRST)
    assert queue.leave(FIRST) == 1 and queue.failures(4, DIED) == [] and queue.take(FIRST) == 4


def test_signs_of_life_are_counted_from_the_start_of_a_process(queue):
    queue.beat("first"), queue.beat("first"), queue.beat("other")
    assert queue.owners() == {FIRST: 2, OTHER: 1}
    queue.enter(FIRST)
    assert queue.owners() == {FIRST: 0, OTHER: 1}


def test_a_process_takes_the_place_of_the_dead_one_before_it(queue):
    queue.take(OTHER)
    queue.enter(BESIDE)
    assert queue.owners() == {FIRST: 0, BESIDE: 0} and queue.failures(4, DIED) == [1]
    assert queue.take(FIRST, is_fresh=False) == 4


def test_a_stop_begins_nothing_more_and_completes_nothing(queue):
    queue.take(FIRST)
    queue.stop()
    assert queue.take(OTHER) is None and queue.is_over() and not queue.is_complete()


def test_reports_come_once_and_in_their_order(queue):
    queue.report(0, "committed", 4, "a")
    queue.report(1, "said")
    assert queue.reports() == [[0, "committed", 4, "a"], [1, "said"]] and queue.reports() == []


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_the_queue_as_it_was(queue, interruption):
    with pytest.raises(interruption), queue.alone():
        queue.execute("UPDATE queue SET state = 'done'")
        raise interruption
    assert queue.take(FIRST) == 4


def test_processes_share_a_queue_in_a_file(tmp_path):
    path = tmp_path / "leases.sqlite"
    with closing(WorkQueue(path)) as queue, closing(WorkQueue(path)) as same:
        with queue.alone():
            queue.fill([0, 1], last=1)
        assert queue.take(FIRST) == 0 and same.help(OTHER, AT_ONCE) == 0 and same.take(OTHER) == 1
