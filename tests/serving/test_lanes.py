"""Who is prepared when: texts never stand behind pictures, and only so much is held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from nvlm_deploy.errors import MachineError
from nvlm_deploy.serving.lanes import Lanes

PATIENCE_S = 10.0


class Job:
    """A job that runs until the test lets it end."""

    def __init__(self) -> None:
        self.has_started, self.may_end, self.has_ended = (threading.Event() for _ in range(3))

    def __call__(self) -> None:
        self.has_started.set()
        assert self.may_end.wait(PATIENCE_S)
        self.has_ended.set()


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(threads=2, max_jobs=8, max_bytes=1000)
    yield made
    made.close()


def submitted(lanes: Lanes, *, has_pictures: bool = False, size_bytes: int = 1) -> Job:
    job = Job()
    lanes.submit(job, has_pictures=has_pictures, size_bytes=size_bytes)
    return job


def end(*jobs: Job) -> None:
    for job in jobs:
        job.may_end.set()
    assert all(job.has_ended.wait(PATIENCE_S) for job in jobs)


def test_a_text_starts_however_many_pictures_wait(lanes) -> None:
    pictures = [submitted(lanes, has_pictures=True) for _ in range(5)]
    text = submitted(lanes)
    assert text.has_started.wait(PATIENCE_S)
    assert not any(picture.has_started.is_set() for picture in pictures[2:])
    end(text, *pictures)


def test_one_picture_leaves_room_for_another(lanes) -> None:
    one, other = submitted(lanes, has_pictures=True), submitted(lanes, has_pictures=True)
    assert other.has_started.wait(PATIENCE_S)
    end(other, one)


def test_a_lane_serves_in_the_order_of_arrival(lanes) -> None:
    jobs = [submitted(lanes) for _ in range(4)]
    assert jobs[1].has_started.wait(PATIENCE_S)
    assert not jobs[2].has_started.is_set()
    end(jobs[0])
    assert jobs[2].has_started.wait(PATIENCE_S)
    assert not jobs[3].has_started.is_set()
    end(*jobs[1:])


def test_one_job_too_many_is_refused_at_once_and_taken_when_another_has_ended(lanes) -> None:
    jobs = [submitted(lanes) for _ in range(8)]
    with pytest.raises(MachineError, match="8 requests wait already"):
        submitted(lanes)
    end(*jobs)
    end(eventually_taken(lanes))


def test_more_bytes_than_may_wait_are_refused_but_a_lone_job_is_not(lanes) -> None:
    large = submitted(lanes, size_bytes=5000)
    with pytest.raises(MachineError, match="1,000 bytes wait already"):
        submitted(lanes)
    end(large)
    end(eventually_taken(lanes, size_bytes=1000))


def eventually_taken(lanes: Lanes, *, size_bytes: int = 1) -> Job:
    """A job counts until its thread is done with it, which is a moment after its end."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return submitted(lanes, size_bytes=size_bytes)
        except MachineError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
