"""Contestants that take turns: a failing one is left out, a hanging one is ended."""

import sys
from pathlib import Path

import pytest

from dispec.bench.compare import Case, Suite, Tree, started, take_turns
from dispec.bench.contestants import ContestantFailed, Worker
from dispec.bench.workload import Workload

# Speaks the protocol of bench/worker.py. FAILS is the round in which it ends instead of answering.
PEER = """
import json, sys
print(json.dumps({"ready": {}}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == FAILS:
        sys.exit("no more")
    asked = json.loads(line)
    count = [asked["output_tokens"]] * len(asked["prompts"])
    print(json.dumps({"seconds": 1.0 + number, "output_tokens": count, "cached_tokens": None}), flush=True)
"""


def worker(name: str, fails: int = -1) -> Worker:
    return Worker(name, [sys.executable, "-c", PEER.replace("FAILS", str(fails))])


def test_a_contestant_that_fails_is_left_out_from_there_on(capsys: pytest.CaptureFixture[str]) -> None:
    lasting, failing = worker("lasting"), worker("failing", fails=2)
    running = [lasting, failing]
    try:
        seconds = take_turns(running, Case(Workload(2, 4, 3)), 1000, rounds=3)
    finally:
        lasting.close()
    assert seconds == {"lasting": [2.0, 3.0, 4.0], "failing": [2.0]}
    assert running == [lasting]
    assert "no more" in capsys.readouterr().out


def test_a_contestant_that_does_not_start_in_time_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hang(_: Path, patience: float) -> Worker:
        return Worker(
            "hanging", [sys.executable, "-c", "import threading; threading.Event().wait()"], patience=patience
        )

    starts = {"hanging": hang, "other": lambda _, __: worker("other")}
    with started(starts, tmp_path, 5.0) as running:
        assert [one.name for one in running] == ["other"]
    assert "hanging ended with code -9" in capsys.readouterr().out


def test_a_checkout_runs_its_own_modules(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "worker.py").write_text("import sys; sys.exit(f'I am {__file__}')")
    with pytest.raises(ContestantFailed, match=f"I am {tmp_path}"):
        Tree("old", tmp_path).start("qwen2.5-1.5b", {}, tmp_path / "cache", 60.0)


def test_a_suites_engine_has_room_for_all_its_cases() -> None:
    suite = Suite("qwen2.5-0.5b", (Case(Workload(4, 64, 8)), Case(Workload(1, 500, 1))))
    assert (suite.max_num_seqs, suite.max_model_len) == (4, 517)
    assert [case.counted_tokens for case in suite.cases] == [32, 500]
