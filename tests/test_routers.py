"""Routers from the package index in front of real workers, unchanged: a real client gets what one server would say.

They live in an environment of their own, named by DISPEC_ROUTERS (CONTRIBUTING.md says how to make it).
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI

from tests.checkpoints import save_tiny
from tests.commands import ROOT
from tests.running_server import PATIENCE, Server, serving

ROUTERS = Path(os.environ.get("DISPEC_ROUTERS", "/nonexistent")) / "bin"
pytestmark = pytest.mark.skipif(not (ROUTERS / "vllm-router").exists(), reason="DISPEC_ROUTERS names no environment")
MANIFESTS = ROOT / "serving" / "deploy" / "kubernetes" / "disaggregated"
KEY = "key-of-the-tests"
PROMPTS = ["The lighthouse was built in 1868 after three ships were lost in a single winter." * 2, "Once", "I am " * 40]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3", max_position_embeddings=512)
    return directory


@contextmanager
def router(*args: str) -> Iterator[str]:
    """A router that has found its workers healthy. The URL of its API."""
    port = free_port()
    command = [*args, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, "the router has ended"
            assert time.monotonic() < deadline, "the router never became ready"
            try:
                if httpx.get(f"{url}/readiness", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def deployed_container(name: str) -> dict[str, Any]:
    """The container of a Kubernetes manifest."""
    manifest = yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return container


def deployed_args(name: str, **replacements: str) -> list[str]:
    """The arguments of a manifest's container, with other addresses and ports."""
    args = [
        arg for arg in deployed_container(name)["args"] if not arg.startswith(("--host", "--port", "--prometheus-port"))
    ]
    for old, new in replacements.items():
        assert any(old in arg for arg in args), old
        args = [arg.replace(old, new) for arg in args]
    return args


def ask(url: str) -> list[object]:
    """The same requests of every kind, over OpenAI's client."""
    found: list[object] = []
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        for index, prompt in enumerate(PROMPTS):
            whole = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=12, temperature=index % 2, seed=index, logprobs=1
            )
            found.append((whole.choices[0].text, whole.choices[0].finish_reason, whole.choices[0].logprobs.tokens))
            messages = [{"role": "user", "content": prompt}]
            stream = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=12, temperature=0.8, seed=index, stream=True
            )
            found.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    return found


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_a_router_splits_requests_between_workers_as_kubernetes_starts_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (router_key,) = deployed_container("router")["env"]
    for name in ("DISPEC_API_KEY", router_key["name"]):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("DISPEC_KV_TRANSFER_SECRET", "secret-of-the-tests")
    with ExitStack() as stack:
        alone = stack.enter_context(serving(model))
        workers = {}
        for role in ("prefill", "decode"):
            args = deployed_args(role, **{"$(POD_IP)": "127.0.0.1", "8100": str(free_port())})
            assert args.pop(0) == "serve"
            workers[role] = stack.enter_context(serving(model, *args))
        addresses = {f"http://dispec-{role}:8000": worker.url for role, worker in workers.items()}
        addresses["0.0.0.0"] = "127.0.0.1"
        url = stack.enter_context(router(str(ROUTERS / "vllm-router"), *deployed_args("router", **addresses)))
        assert httpx.get(f"{url}/liveness").status_code == 200
        assert ask(url) == ask(alone.url)
        prefill, decode = workers["prefill"], workers["decode"]
        assert metric(decode, 'dispec_kv_transfers_total{engine="0",model_name="tiny",outcome="arrived"}') == 6
        assert metric(decode, 'dispec_kv_transfers_total{engine="0",model_name="tiny",outcome="failed"}') == 0
        assert metric(prefill, "vllm:generation_tokens_total") == 6
        refused = httpx.post(f"{decode.url}/v1/completions", json={"prompt": "x", "model": "tiny"})
        assert refused.status_code == 401  # the workers' keys are in force: the router sends its own


def test_a_router_spreads_requests_over_replicas(model: Path) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(serving(model)) for _ in range(2)]
        urls = [replica.url for replica in replicas]
        command = [str(ROUTERS / "sglang-router"), "launch", "--policy", "cache_aware", "--worker-urls", *urls]
        url = stack.enter_context(router(*command))
        assert ask(url) == ask(urls[0])
        first, second = (metric(replica, "vllm:request_success_total") for replica in replicas)
        assert first + second == 12  # six by way of the router
