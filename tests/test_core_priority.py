"""Decode steps give way to prefill steps of other workers on the same cores, for a bounded time."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from dispec.engine.process.core_priority import CorePriority


class Clock:
    """A time that only steps and sleeps move. on_sleep: called after each sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.on_sleep = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "cores").touch()
    return str(tmp_path / "cores")


def decode(path: str, clock: Clock, seconds: float) -> float:
    """Run a decode step of that length; return how long its worker waits afterwards."""
    with CorePriority(path, "decode", clock, clock.sleep).step():
        clock.now += seconds
        ended = clock.now
    return clock.now - ended


def test_a_decode_step_alone_is_followed_by_the_next(path):
    clock = Clock()
    assert decode(path, clock, 0.01) == 0
    with CorePriority(path, "decode", clock, clock.sleep).step():
        assert decode(path, clock, 0.01) == 0  # beside one of another decode worker


def test_a_decode_worker_waits_for_four_steps_while_a_prompt_is_computed(path):
    clock = Clock()
    with CorePriority(path, "prefill").step():
        assert decode(path, clock, 0.01) == pytest.approx(0.04, abs=0.0011)
    assert decode(path, clock, 0.01) == 0


def test_after_a_long_step_a_decode_worker_waits_two_seconds(path):
    clock = Clock()
    with CorePriority(path, "prefill").step():
        assert decode(path, clock, 3.0) == pytest.approx(2.0, abs=0.0011)


def test_it_waits_for_the_prompts_of_all_prefill_workers(path):
    clock = Clock()
    with CorePriority(path, "prefill").step():
        with CorePriority(path, "prefill").step():  # at the same time: prefill workers do not wait for each other
            pass
        assert decode(path, clock, 0.01) > 0


def test_it_goes_on_when_the_prefill_step_ends(path):
    clock = Clock()
    with ExitStack() as prefill:
        prefill.enter_context(CorePriority(path, "prefill").step())

        def end_after_ten_milliseconds() -> None:
            if clock.now > 100.02:
                prefill.close()

        clock.on_sleep = end_after_ten_milliseconds
        assert decode(path, clock, 0.01) == pytest.approx(0.01, abs=0.0015)


def test_a_step_that_fails_leaves_no_precedence(path):
    with pytest.raises(RuntimeError, match="no memory"), CorePriority(path, "prefill").step():
        raise RuntimeError("no memory")
    assert decode(path, Clock(), 0.01) == 0


def test_nor_does_a_worker_that_is_killed(path):
    code = """
import sys
from dispec.engine.process.core_priority import CorePriority
with CorePriority(sys.argv[1], "prefill").step():
    print("in a step", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert decode(path, Clock(), 0.01) > 0
        process.kill()
        process.wait()
        assert decode(path, Clock(), 0.01) == 0
