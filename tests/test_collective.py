"""The collectives between two processes, eager and traced into one graph."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import sys
import torch
import torch.distributed as dist
from dispec import ops

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
group = dist.group.WORLD.group_name
own = torch.arange(5) + 10 * rank
collectives = [
    lambda x: ops.broadcast(x, group),
    lambda x: ops.all_reduce(x.float(), group).long(),
    lambda x: ops.all_gather_columns(x[None].float(), group, 2)[0].long(),
]
for collective in collectives:
    for function in (collective, torch.compile(collective, fullgraph=True, backend="aot_eager")):
        print(function(own).tolist(), own.tolist())
dist.destroy_process_group()
"""
EXPECTED = {
    "broadcast": [0, 1, 2, 3, 4],
    "all_reduce": [10, 12, 14, 16, 18],
    "all_gather_columns": [0, 1, 2, 3, 4, 10, 11, 12, 13, 14],
}


def test_all_ranks_get_the_same_result_and_keep_their_input(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            own = [10 * rank + number for number in range(5)]
            expected = [f"{found} {own}" for found in EXPECTED.values() for _ in ("eager", "compiled")]
            assert process.communicate(timeout=120)[0].splitlines() == expected
    finally:
        for process in ranks:
            process.kill()
            process.wait()
