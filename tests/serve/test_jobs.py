"""rapidin.serve.jobs: one job at a time, a limited number waits, any can be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rapidin.serve.jobs import CancelledError, Job, QueueFullError, Worker

SECONDS = 30


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(3)
    yield made
    made.close()


class Held:
    """Work that begins, and ends when it is let go or cancelled."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.begun.set()
        while not self.go.wait(0.01):
            job.check()
        return "done"


def test_jobs_are_done_one_after_the_other_in_their_order(worker: Worker) -> None:
    order: list[int] = []
    held = Held()
    first = worker.submit(held)
    assert held.begun.wait(SECONDS)
    told: list[tuple[str, dict[str, Any]]] = []
    later = [worker.submit(lambda _, n=n: order.append(n), lambda *event: told.append(event)) for n in (1, 2)]
    assert worker.waiting == 2
    assert told == [("waiting", {"before": 1}), ("waiting", {"before": 2})]
    held.go.set()
    for job in later:
        job.result.result(SECONDS)
    assert (first.result.result(), order) == ("done", [1, 2])
    assert told[2:] == [("waiting", {"before": 1})]  # the second, once the first is done


def test_too_many_jobs_are_refused_until_one_is_cancelled(worker: Worker) -> None:
    held = Held()
    worker.submit(held)
    assert held.begun.wait(SECONDS)
    waiting = [worker.submit(lambda _: None) for _ in range(3)]
    with pytest.raises(QueueFullError):
        worker.submit(lambda _: None)
    waiting[1].cancel()
    last = worker.submit(lambda _: "last")
    with pytest.raises(CancelledError):
        waiting[1].result.result(SECONDS)
    held.go.set()
    assert last.result.result(SECONDS) == "last"


def test_a_job_that_is_done_can_be_cancelled(worker: Worker) -> None:
    held = Held()
    job = worker.submit(held)
    assert held.begun.wait(SECONDS)
    job.cancel()
    with pytest.raises(CancelledError):
        job.result.result(SECONDS)
    assert worker.submit(lambda _: "next").result.result(SECONDS) == "next"


def test_an_error_is_that_of_its_job_alone(worker: Worker) -> None:
    def fails(_: Job) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        worker.submit(fails).result.result(SECONDS)
    assert worker.submit(lambda _: "next").result.result(SECONDS) == "next"


def test_closing_cancels_all_and_takes_no_more() -> None:
    worker, held = Worker(3), Held()
    jobs = [worker.submit(held), worker.submit(lambda _: "never")]
    assert held.begun.wait(SECONDS)
    worker.close()
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result.result(SECONDS)
    with pytest.raises(QueueFullError):
        worker.submit(lambda _: None)
