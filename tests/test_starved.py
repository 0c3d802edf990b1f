"""A run that waits for processors warns, once."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from pairtune.track.starved import StarvedSink


def tasks(folder, **threads):
    for name, (ran, waited) in threads.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "schedstat").write_text(f"{ran} {waited} 7\n")
    return folder


def test_waiting_is_measured_over_all_threads_and_said_once(tmp_path):
    said = []
    sink = StarvedSink(said.append, tasks(tmp_path, one=(100, 900), two=(0, 0)))
    tasks(tmp_path, one=(1100, 1000), two=(1000, 100))  # 2,000 run and 200 waited since
    sink.look()
    assert not said
    tasks(tmp_path, one=(2100, 2000), two=(2000, 100), three=(0, 500))
    sink.look()
    assert len(said) == 1
    assert "the run waited for one 43% of the time" in said[0]


def test_a_system_that_does_not_say_is_not_asked(tmp_path):
    said = []
    StarvedSink(said.append, tmp_path / "none").look()
    assert not said


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's account of threads")
def test_a_really_starved_process_notices():
    """Two processes on one processor: each waits about half of the time."""
    bound = os.sched_getaffinity(0)
    said, one = [], {min(bound)}
    os.sched_setaffinity(0, one)
    try:
        other = multiprocessing.get_context("fork").Process(target=spin, args=(3.0,), daemon=True)
        other.start()
        sink = StarvedSink(said.append)
        spin(1.5)
        sink.look()
        other.kill()
        other.join()
    finally:
        os.sched_setaffinity(0, bound)
    assert said
