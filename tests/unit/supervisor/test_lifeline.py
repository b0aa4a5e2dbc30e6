"""What a worker says reaches its supervisor, however it is cut up; the supervisor's end reaches the worker."""

from __future__ import annotations

import os
import threading

from outrider_server.supervisor.lifeline import SENTENCE_CHARACTERS_MAX, SupervisorEnd, WorkerEnd


def pair() -> tuple[SupervisorEnd, WorkerEnd]:
    """Both ends, as after a start."""
    supervisor = SupervisorEnd()
    worker = WorkerEnd(os.dup(supervisor.inherited.fileno()))
    supervisor.inherited.close()
    return supervisor, worker


def close(worker: WorkerEnd) -> None:
    worker._socket.close()


def test_a_worker_is_ready_when_it_says_so() -> None:
    supervisor, worker = pair()
    assert supervisor.read()
    assert not supervisor.ready
    worker.tell_ready()
    assert supervisor.read()
    assert supervisor.ready
    assert supervisor.refusal is None
    close(worker)
    assert not supervisor.read()
    supervisor.close()


def test_a_refusal_is_one_bounded_line() -> None:
    supervisor, worker = pair()
    worker.tell_refused("first\nsecond " + "x" * 5_000)
    close(worker)
    assert not supervisor.read()
    assert supervisor.refusal is not None
    assert supervisor.refusal.startswith("first second x")
    assert len(supervisor.refusal) == SENTENCE_CHARACTERS_MAX
    assert not supervisor.ready
    supervisor.close()


def test_what_is_said_in_pieces_is_heard_and_what_is_no_word_is_not_kept() -> None:
    supervisor, worker = pair()
    worker._socket.sendall(b"noise\nrea")
    assert supervisor.read()
    assert not supervisor.ready
    worker._socket.sendall(b"dy\n")
    assert supervisor.read()
    assert supervisor.ready
    for _ in range(20):
        worker._socket.sendall(b"x" * 4_000)
        assert supervisor.read()
    assert len(supervisor._said) <= 16 * 1024
    close(worker)
    supervisor.close()


def test_the_end_of_the_supervisor_is_told_once() -> None:
    supervisor, worker = pair()
    told = threading.Event()
    worker.watch(told.set, 3_600)
    assert not told.wait(0.05)
    supervisor.close()
    assert told.wait(10)
    worker.tell_ready()  # nobody hears it, and nothing is raised
