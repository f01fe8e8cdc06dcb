"""The host's part of decode steps is measured for more prompt tokens than one step takes."""

import pytest

from dispec.bench import scheduler
from dispec.engine.options import EngineOptions


def test_prompts_of_more_tokens_than_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    EngineOptions(max_num_batched_tokens=scheduler.MAX_STEP_TOKENS)
    monkeypatch.setattr(scheduler, "MAX_STEP_TOKENS", 32)
    records = scheduler.measure(num_sequences=4, context=16, steps=2, block_size=16, temperature=0.0)
    assert [(record.kind, record.num_sequences) for record in records] == [("decode", 4)] * 2
