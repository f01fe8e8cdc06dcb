"""Prometheus and Grafana as `serving/monitoring` sets them up: against a real Prometheus where there is one."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.checkpoints import save_tiny
from tests.running_server import PATIENCE, serving, under_load

DIRECTORY = Path(__file__).resolve().parent.parent / "serving" / "monitoring"
PROMETHEUS = shutil.which("prometheus")
KEY = "secret-of-ours"


def load_yaml(*parts: str) -> dict:
    return yaml.safe_load(DIRECTORY.joinpath(*parts).read_text())


def panels() -> list[dict]:
    return json.loads((DIRECTORY / "grafana/dashboards/dispec.json").read_text())["panels"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_grafana_requires_a_password_from_the_operator() -> None:
    services = load_yaml("compose.yaml")["services"]
    grafana = services["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert re.fullmatch(r"\$\{\w+:\?.*\}", grafana["GF_SECURITY_ADMIN_PASSWORD"])  # compose fails if it is not set
    assert grafana["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]


def test_the_parts_find_each_other() -> None:
    services = load_yaml("compose.yaml")["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DIRECTORY / source).exists(), source
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])  # a fixed version
    (source,) = load_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]} == {source["uid"]}
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    (provider,) = load_yaml("grafana/provisioning/dashboards/dispec.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    (job,) = load_yaml("prometheus.yml")["scrape_configs"]
    (key,) = services["prometheus"]["configs"]
    assert job["authorization"]["credentials_file"] == key["target"]


@contextmanager
def prometheus(directory: Path, target: str, key: str):
    """A Prometheus with our configuration, but for what it scrapes, how often, and where its key lies."""
    configuration = load_yaml("prometheus.yml")
    configuration["global"]["scrape_interval"] = "1s"
    (job,) = configuration["scrape_configs"]
    job["static_configs"][0]["targets"] = [target]
    job["authorization"]["credentials_file"] = str(directory / "key")
    (directory / "key").write_text(key)
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert PROMETHEUS is not None
    command = [PROMETHEUS, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    command += [f"--web.listen-address={address}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield f"http://{address}"
        finally:
            process.kill()


def until(condition, what: str):
    """Ask again and again, a few times a second, until there is an answer."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.2)
    return answer


def query(url: str, expression: str) -> list[float]:
    """The values of an expression now; empty while there are none."""
    try:
        response = httpx.get(f"{url}/api/v1/query", params={"query": expression})
    except httpx.TransportError:
        return []
    if response.status_code == 503:  # it is starting
        return []
    assert response.status_code == 200, (expression, response.text)
    return [float(sample["value"][1]) for sample in response.json()["data"]["result"]]


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus")
def test_every_expression_of_the_dashboard_has_data_under_load(tmp_path) -> None:
    save_tiny(tmp_path / "tiny", "llama")
    with (
        serving(tmp_path / "tiny", "--api-key", KEY) as server,
        prometheus(tmp_path, server.url.removeprefix("http://"), KEY) as url,
        under_load(server, key=KEY),
    ):
        assert until(lambda: query(url, 'up{job="dispec"} == 1'), "the first scrape") == [1]
        for expression in expressions():
            asked = expression.replace("$__rate_interval", "10s")

            def has_data(asked: str = asked) -> bool:
                values = query(url, asked)
                return bool(values) and not any(map(math.isnan, values))

            until(has_data, expression)
        for busy in ("rate(vllm:generation_tokens_total[10s])", "vllm:num_requests_running"):
            assert until(lambda asked=busy: query(url, f"{asked} > 0"), busy)
        assert query(url, 'up{job="dispec"} == 1') == [1]
