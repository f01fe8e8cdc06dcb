"""Running the tests in several processes: `pytest -n logical`, a process for each core.

A process takes whole files, so that the fixtures of a module are made once, and the longest files go first.
"""

import os
from typing import Any

import pytest

from tests import shape_checks

if "PYTEST_XDIST_WORKER" in os.environ:
    # Also for the processes that tests start: threads that wait for one another collapse where all cores are taken.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# About 20 seconds or more on a Zen 5: the other cores would be idle while one that starts last runs.
LONGEST = (
    "test_triton_layer.py",
    "test_triton_kernels.py",
    "test_network_cut.py",
    "test_dashboard_page.py",
    "test_tensor_parallel.py",
    "test_tensor_parallel_model.py",
    "test_faults.py",
    "test_compile.py",
    "test_triton_aot.py",
    "test_distill.py",
    "test_engine_client.py",
    "test_worker_pool.py",
    "test_grammar_preemption.py",
    "test_step_graphs.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler of whole files."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # by the number of tests
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Move the longest files to the front if the tests run in several processes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        ranks = {name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Check the shapes of each test anew."""
    shape_checks.check_again()
