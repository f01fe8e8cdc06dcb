"""Two hosts on one machine: workers in network namespaces of their own, and the link between them cut and healed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from dispec.bench.mixed_load import ready_url
from tests.checkpoints import save_tiny
from tests.commands import ROOT, THREADS, eager
from tests.running_server import PATIENCE
from tests.servers import wait_for
from tests.small_engine import greedy, make, random_tokens

HOSTS = {"prefill": 1, "decode": 2}


def ip(*args: str) -> bool:
    if shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", *args], capture_output=True, check=False).returncode == 0


@contextmanager
def network() -> Iterator[None]:
    """Each host has a link to us, 10.78.N.2, and one to the other, 10.77.0.N."""
    names = {role: f"dispec-{role}-{os.getpid()}" for role in HOSTS}
    if not all(ip("netns", "add", name) for name in names.values()):
        pytest.skip("network namespaces need root and iproute2")
    try:
        for role, number in HOSTS.items():
            outer = f"dsp{number}x{os.getpid() % 10000}"
            assert ip("link", "add", outer, "type", "veth", "peer", "name", "up0", "netns", names[role])
            assert ip("addr", "add", f"10.78.{number}.1/24", "dev", outer)
            assert ip("link", "set", outer, "up")
            assert ip("-n", names[role], "addr", "add", f"10.78.{number}.2/24", "dev", "up0")
            assert ip("-n", names[role], "link", "set", "up0", "up")
            assert ip("-n", names[role], "link", "set", "lo", "up")
        data = ["link", "add", "kv0", "type", "veth", "peer", "name", "kv0", "netns", names["decode"]]
        assert ip("-n", names["prefill"], *data)
        for role, number in HOSTS.items():
            assert ip("-n", names[role], "addr", "add", f"10.77.0.{number}/24", "dev", "kv0")
            assert ip("-n", names[role], "link", "set", "kv0", "up")
        yield
    finally:
        for name in names.values():
            ip("netns", "del", name)


def set_link(state: str) -> None:
    assert ip("-n", f"dispec-prefill-{os.getpid()}", "link", "set", "kv0", state)


@contextmanager
def worker(role: str, model: Path) -> Iterator[str]:
    """Its URL."""
    number = HOSTS[role]
    command = [
        "ip",
        "netns",
        "exec",
        f"dispec-{role}-{os.getpid()}",
        sys.executable,
        "-m",
        "dispec",
        "serve",
    ]
    command += [*eager(str(model)), "--dtype", "float32", "--block-size", "16", "--host", f"10.78.{number}.2"]
    command += ["--port", "0", "--role", role, "--kv-transfer", "tcp", "--kv-transfer-host", f"10.77.0.{number}"]
    command += ["--kv-transfer-lease", "3"]
    secrets = {"DISPEC_KV_TRANSFER_SECRET": "what both of them know", "OMP_NUM_THREADS": THREADS}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | secrets, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        yield ready_url(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def split(prefill: str, decode: str, prompt: list[int]) -> list[int]:
    """What a router does; the tokens of the answer."""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    asked = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    first = httpx.post(f"{prefill}/v1/completions", json=body | asked, timeout=PATIENCE).raise_for_status().json()
    told = {"kv_transfer_params": first["kv_transfer_params"]}
    answer = httpx.post(f"{decode}/v1/completions", json=body | told, timeout=PATIENCE).raise_for_status().json()
    return answer["choices"][0]["token_ids"]


def counted(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.slow
def test_a_cut_link_costs_time_and_nothing_else(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3", max_position_embeddings=512)
    llm = make(tmp_path)
    prompts = [random_tokens(100, seed) for seed in range(12)]
    expected = [one.outputs[0].token_ids for one in llm.generate(prompts, greedy(12))]
    with ExitStack() as stack:
        stack.enter_context(network())
        prefill, decode = (stack.enter_context(worker(role, tmp_path)) for role in HOSTS)

        def ask(numbers: range) -> None:
            with ThreadPoolExecutor(len(numbers)) as threads:
                found = list(threads.map(lambda number: split(prefill, decode, prompts[number]), numbers))
            assert found == expected[numbers.start : numbers.stop]

        def arrived(outcome: str) -> float:
            labels = f'engine="0",model_name="{tmp_path.name}",outcome="{outcome}"'
            return counted(decode, f"dispec_kv_transfers_total{{{labels}")

        ask(range(0, 4))
        assert (arrived("arrived"), arrived("failed")) == (4, 0)
        set_link("down")
        ask(range(4, 8))
        assert (arrived("arrived"), arrived("failed")) == (4, 4)
        set_link("up")
        ask(range(8, 12))
        assert (arrived("arrived"), arrived("failed")) == (8, 4)
        for url in (prefill, decode):
            wait_for(lambda url=url: used_blocks(url) == 0, "blocks given back")


def used_blocks(url: str) -> int:
    return int(httpx.get(f"{url}/stats", timeout=PATIENCE).json()["engine"]["used_blocks"])
