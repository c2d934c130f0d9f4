"""The runner of test bodies on ranks: what comes back, and that no failure hangs or leaves anyone.

Tests that fail ranks on purpose share some of their own: after each the next starts fresh ones,
which other tests should not have to wait for.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import fresh
import pytest
import torch
import torch.distributed as dist

from opsgraph.testing.distributed import RankError, Ranks, run


@pytest.fixture(scope="module")
def own(forked: None) -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def total(rank, size, x):
    """The sum over ranks of x * (rank + 1)."""
    x = x * (rank + 1)
    dist.all_reduce(x)
    return x, rank, size, dist.get_world_size(), torch.get_num_threads()


def pid(rank, size):
    return os.getpid()


def subgroup(rank, size):
    """Leaves a process group and a collective behind that was not waited for."""
    group = dist.new_group([0])
    if rank == 0:
        dist.all_reduce(torch.ones(3), group=group, async_op=True)
    return None


def raises(rank, size):
    if rank == 1:
        raise KeyError("a key of rank 1")
    dist.barrier()


def leaves(rank, size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def killed(rank, size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exits(rank, size):
    if rank == 1:
        sys.exit("done early")
    dist.barrier()


def hangs(rank, size):
    if rank == 1:
        time.sleep(1000)
    dist.barrier()


def unpicklable(rank, size):
    return lambda: rank


def gone(pids):
    """Whether none of these processes is left, waiting a moment for the system to clear them."""
    for _ in range(50):
        left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        if not left:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_results_come_back_by_rank(ranks, size):
    found = ranks.run(total, size, torch.arange(3.0))
    whole = torch.arange(3.0) * sum(range(1, size + 1))
    for rank, (x, *rest) in enumerate(found):
        torch.testing.assert_close(x, whole)
        assert rest == [rank, size, size, 1]


def test_bodies_share_processes(ranks):
    four = ranks.run(pid, 4)
    assert len({*four, os.getpid()}) == 5
    assert ranks.run(pid, 2) == four[:2]
    assert four == ranks.pids


def test_a_body_has_a_process_group_of_its_own(ranks):
    ranks.run(subgroup, 2)
    (x, *_), _ = ranks.run(total, 2, torch.ones(1))
    assert x.item() == 3


@pytest.mark.parametrize(
    "body, told",
    [
        (raises, r"test_runner\.py\", line \d+, in raises\n(.*\n)+KeyError: 'a key of rank 1'"),
        (killed, "rank 1 of 2: killed by signal 9"),
        pytest.param(leaves, "rank 1 of 2: ended with exit code 7", marks=pytest.mark.slow),
        pytest.param(exits, "SystemExit: done early", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_the_others(own, body, told):
    own.run(pid, 2)
    pids, start = own.pids, time.monotonic()
    with pytest.raises(RankError) as caught:
        own.run(body, 2, timeout=60)
    assert time.monotonic() - start < 20, "ended by the failure, not by the time limit"
    assert 1 in caught.value.ranks
    assert re.search(told, str(caught.value))
    assert gone(pids)


def test_a_hanging_rank_is_ended_and_its_stack_shown(own):
    own.run(pid, 2)
    pids, start = own.pids, time.monotonic()
    with pytest.raises(RankError) as caught:
        own.run(hangs, 2, timeout=2)
    assert time.monotonic() - start < 20
    assert gone(pids)
    message = str(caught.value)
    assert caught.value.ranks == (0, 1)
    assert "rank 1 of 2: not done after 2 s" in message
    sleeping = message.index("rank 1 of 2")
    assert "in barrier" in message[:sleeping]
    assert "in hangs" in message[sleeping:]


@pytest.mark.slow
def test_a_rank_that_died_between_bodies_is_told(own):
    own.run(pid, 2)
    os.kill(own.pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 0 of 2: killed by signal 9"):
        own.run(total, 2, torch.ones(1))
    assert len(own.run(pid, 2)) == 2, "the next body has fresh ranks"


def test_what_cannot_be_pickled_is_refused(own):
    with pytest.raises(TypeError, match=r"<lambda>.*expected a function at a module's top level"):
        own.run(lambda rank, size: None, 2)
    with pytest.raises(RankError, match="pickle"):
        own.run(unpicklable, 2)


def test_leaving_ends_the_ranks():
    pids = run(pid, 1)
    assert pids != [os.getpid()]
    assert gone(pids)


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{here!r}]
import test_runner
from opsgraph.testing.distributed import Ranks
if __name__ == "__main__":
    ranks = Ranks()
    print(*ranks.run(test_runner.pid, 1), flush=True)
    {end}
"""


@pytest.mark.parametrize(
    "end",
    ["os.kill(os.getpid(), signal.SIGKILL)", pytest.param("sys.exit(3)", marks=pytest.mark.slow)],
)
def test_ranks_end_with_their_parent(tmp_path, end):
    done = fresh.run(SCRIPT.format(here=os.path.dirname(__file__), end=end), tmp_path)
    assert done.code in (-signal.SIGKILL, 3), done.error
    assert gone([int(done.output)])
