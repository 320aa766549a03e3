"""What `rankup up` does about an embedded server that dies, and about a head that died."""

from __future__ import annotations

import threading

import pytest

from rankup.cli.watch import CALM_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, HeadLostError, Watch
from rankup.errors import SetupError, UnreachableError


class Servers:
    """Dies when told, and comes back when it may."""

    def __init__(self) -> None:
        self.down: tuple[str, ...] = ()
        self.stubborn = False
        self.tries: list[float] = []
        self.restored = 0
        self.unrestorable = False
        self.now = 1000.0

    def dead(self) -> tuple[str, ...]:
        return self.down

    def revive(self) -> None:
        self.tries.append(self.now)
        if self.stubborn:
            raise SetupError("the embedded valkey has ended while starting")
        self.down = ()

    def restore(self) -> None:
        if self.unrestorable:
            raise UnreachableError("object storage does not answer")
        self.restored += 1

    def clock(self) -> float:
        return self.now


def watch_over(servers: Servers, lines: list[str] | None = None) -> Watch:
    return Watch(servers, lambda: None, servers.restore, (lines if lines is not None else []).append, servers.clock)


def test_a_dead_server_is_started_again_at_once_and_the_terminal_says_so() -> None:
    servers, lines = Servers(), list[str]()
    watch = watch_over(servers, lines)
    watch.look()
    assert (servers.tries, lines) == ([], [])
    servers.down = ("valkey", "seaweedfs")
    watch.look()
    assert servers.tries == [1000.0]
    assert lines == ["valkey and seaweedfs died: starting again", "valkey and seaweedfs back after 0.0 s"]


def test_one_that_does_not_come_up_is_tried_later_and_later_up_to_a_minute() -> None:
    servers, lines = Servers(), list[str]()
    watch = watch_over(servers, lines)
    servers.down, servers.stubborn = ("valkey",), True
    for _ in range(2000):
        watch.look()
        servers.now += 0.25
    pauses = [after - before for before, after in zip(servers.tries, servers.tries[1:], strict=False)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S]
    assert set(pauses[7:]) <= {LONGEST_PAUSE_S}
    assert lines[1] == "the embedded valkey has ended while starting; trying again in 1 s"


def test_after_a_calm_time_it_is_started_at_once_again() -> None:
    servers = Servers()
    watch = watch_over(servers)
    for later in (0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, CALM_S + 1):
        servers.now += later
        servers.down = ("seaweedfs",)
        watch.look()
        assert servers.down == ()
    servers.down = ("seaweedfs",)
    watch.look()
    assert servers.down == ("seaweedfs",), "it died at once: it waits"


def test_what_came_back_without_its_data_is_restored_and_that_is_tried_until_it_works() -> None:
    servers, lines = Servers(), list[str]()
    watch = watch_over(servers, lines)
    servers.down, servers.unrestorable = ("valkey",), True
    watch.look()
    assert (servers.down, servers.restored) == ((), 0)
    assert lines[-1] == "object storage does not answer; trying again in 1 s"
    watch.look()
    servers.unrestorable = False
    watch.look()
    assert servers.restored == 0, "it waits"
    servers.now += 1.0
    watch.look()
    assert servers.restored == 1
    servers.now += 10.0
    watch.look()
    assert servers.restored == 1
    assert servers.tries == [1000.0]


def test_a_lost_head_ends_the_watch_also_where_no_server_is_embedded() -> None:
    with pytest.raises(HeadLostError, match="gcs_server"):
        Watch(None, lambda: "gcs_server", lambda: None, list[str]().append, lambda: 0.0).run(threading.Event())


def test_it_ends_when_it_is_told_to() -> None:
    stopped = threading.Event()
    stopped.set()
    Watch(None, lambda: "gcs_server", lambda: None, list[str]().append, lambda: 0.0).run(stopped)
