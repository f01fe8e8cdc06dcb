"""`engine_loop` with faults that only a broken kernel or driver could cause, chosen by a request's seed."""

import ctypes
from typing import Any

from dispec.engine.execution import model_runner as runner
from dispec.engine.process import engine_loop as service
from dispec.engine.scheduling.scheduler_output import SchedulerOutput

FAILS_ALONE, FAILS_FOR_ALL, CRASHES = 666, 667, 668


def _launch(self: Any, step: SchedulerOutput, *others: Any) -> Any:
    seeds = {one.sequence.seed for one in step.scheduled_sequences if one.sequence.num_output_tokens >= 3}
    if CRASHES in seeds:
        ctypes.string_at(0)
    if FAILS_ALONE in seeds:
        raise RuntimeError("this one cannot be computed")
    if FAILS_FOR_ALL in seeds:
        _Broken.is_broken = True
    if _Broken.is_broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return _LAUNCH(self, step, *others)


class _Broken:
    is_broken = False


_LAUNCH = runner.ModelRunner.launch

if __name__ == "__main__":
    # Here alone: the tests import this module for its numbers, and their own engines shall have no faults.
    runner.ModelRunner.launch = _launch  # type: ignore[method-assign]
    service.main()
