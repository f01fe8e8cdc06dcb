"""Contestants that take turns: a failing one is left out, a hanging one is ended."""

import sys
from pathlib import Path

import pytest

from dispec.bench.checkouts import Tree
from dispec.bench.compare import SUITES, Case, Suite, take_turns
from dispec.bench.contestants import ContestantFailed, Worker, started
from dispec.bench.gpu_run import ROOT, import_path
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


def test_a_contestant_that_does_not_start_in_time_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def hang() -> Worker:
        return Worker("hanging", [sys.executable, "-c", "import threading; threading.Event().wait()"], patience=5.0)

    with started({"hanging": hang, "other": lambda: worker("another name")}) as running:
        assert [one.name for one in running] == ["other"]
    assert "hanging ended with code -9" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["old", "new", "new without links"])
def test_a_checkout_runs_its_own_modules(kind: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for room in ("bench", "engine", "layers", "ops", "serving"):
        (tree / room).mkdir(parents=True)
        (tree / room / "__init__.py").touch()
    (tree / "bench" / "worker.py").write_text(
        "import sys, pathlib; sys.exit(f'{__spec__.name} of {pathlib.Path(__file__).resolve()}')"
    )
    if kind != "old":
        (tree / "serving" / "dispec").mkdir()
        (tree / "serving" / "dispec" / "__init__.py").touch()
    if kind == "new":
        assert import_path(tree, tree / ".ci" / "links") == tree / ".ci" / "links"
    module = "bench.worker" if kind == "old" else "dispec.bench.worker"
    with pytest.raises(ContestantFailed, match=f"{module} of {tree / 'bench' / 'worker.py'}"):
        Tree("checkout", tree).start("qwen2.5-1.5b", {}, tmp_path / "cache", 60.0)
    assert (tmp_path / "cache" / "links").exists() == (kind == "new without links")


def test_this_checkout_is_imported_by_its_links(tmp_path: Path) -> None:
    assert import_path(ROOT, tmp_path) == ROOT / ".ci" / "links"
    assert not any(tmp_path.iterdir())


def test_a_suites_engine_has_room_for_all_its_cases() -> None:
    suite = Suite("qwen2.5-0.5b", (Case(Workload(4, 64, 8)), Case(Workload(1, 500, 1))))
    assert (suite.max_num_seqs, suite.max_model_len) == (4, 517)
    assert [case.counted_tokens for case in suite.cases] == [32, 500]
    token = 2 * 24 * 2 * 64 * 2  # keys and values of 24 layers of two heads of 64, at two bytes
    assert 4 * 500 * token > suite.kv_bytes >= 501 * token


def test_the_caches_of_all_suites_fit_on_one_gpu_beside_each_other() -> None:
    for suite in SUITES.values():
        assert suite.kv_bytes < 3e9
        assert suite.max_model_len == max(case.workload.tokens for case in suite.cases) + 16
