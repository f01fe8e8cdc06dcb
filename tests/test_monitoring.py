"""Prometheus and Grafana as `serving/deploy` sets them up: against a real Prometheus where there is one."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dispec.serving.cluster.worker_metrics import WorkerMetrics
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.observability.metrics import Metrics
from tests.checkpoints import save_tiny
from tests.commands import ROOT
from tests.running_server import PATIENCE, serving, under_load

DEPLOY = ROOT / "serving" / "deploy"
DIRECTORY = DEPLOY / "monitoring"
PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
KEY = "secret-of-ours"
OF_PROMETHEUS = {"up", "ALERTS"}
NEEDS_FAILURES = "ALERTS"  # has no series while all is well


def load_yaml(*parts: str) -> dict:
    return yaml.safe_load(DIRECTORY.joinpath(*parts).read_text())


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def dashboard() -> dict:
    return json.loads((DIRECTORY / "grafana/dashboards/dispec.json").read_text())


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def filled(expression: str) -> str:
    """An expression of the dashboard as Grafana sends it, with all variables at "All"."""
    return re.sub(r"\$(model|instance|role)", ".*", expression.replace("$__rate_interval", "10s"))


def expressions() -> list[str]:
    return [filled(target["expr"]) for panel in panels() for target in panel["targets"]]


def alert_rules() -> list[dict]:
    return load_yaml("rules/dispec.rules.yml")["groups"][0]["rules"]


def selectors(parsed: Any) -> Iterator[promql_parser.VectorSelector]:
    """The series that a parsed expression reads."""
    if isinstance(parsed, promql_parser.VectorSelector):
        yield parsed
    children = (getattr(parsed, name, None) for name in ("lhs", "rhs", "expr", "vector_selector", "vs"))
    for child in [*children, *getattr(parsed, "args", [])]:
        if child is not None:
            yield from selectors(child)


def exported() -> set[str]:
    """The names of all series of a server, with workers or without."""
    metrics = Metrics("m")
    WorkerMetrics(
        WorkerPool({}, num_prefill=1, num_decode=1, max_queued_requests=1, max_queued_tokens=1, stall_seconds=1),
        metrics,
    )
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    families = text_string_to_metric_families(metrics.render().decode())
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def test_every_metric_of_dashboard_and_alerts_is_exported() -> None:
    names = exported()
    assert {"vllm:num_requests_running", "dispec_worker_step_seconds_bucket"} <= names
    of_alerts = [rule["expr"] for rule in alert_rules()]
    assert len(of_alerts) >= 8
    read: set[str] = set()
    for expression in expressions() + of_alerts:
        found = [selector.name for selector in selectors(promql_parser.parse(expression))]
        assert found, expression
        read.update(name for name in found if name)
    assert read - OF_PROMETHEUS <= names
    variables = " ".join(str(variable.get("query")) for variable in dashboard()["templating"]["list"])
    assert set(re.findall(r"dispec_\w+", variables)) <= names


def test_the_dashboard_is_laid_out() -> None:
    found = dashboard()
    rows = [panel["title"] for panel in found["panels"] if panel["type"] == "row"]
    assert [title.split(" (")[0] for title in rows] == [
        "Overview", "Service level objectives", "Workers", "KV transfer", "Speculation", "Cache",
    ]  # fmt: skip
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_panels_have_units_and_follow_the_variables() -> None:
    names = [variable["name"] for variable in dashboard()["templating"]["list"]]
    assert names == ["datasource", "model", "role", "instance"]
    for panel in panels():
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"]
        assert defaults["unit"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            if not target["expr"].startswith("ALERTS"):
                assert target["expr"].count("$instance") == target["expr"].count("{") > 0
            if defaults["unit"] == "percentunit":  # a sum over servers would exceed 100 %
                assert not re.match(r"sum[^/]*$", target["expr"])


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool")
def test_alerts_fire_when_they_should() -> None:
    assert PROMTOOL is not None
    rules = DIRECTORY / "rules"
    for command in (("check", "rules", "dispec.rules.yml"), ("test", "rules", "dispec.test.yml")):
        done = subprocess.run([PROMTOOL, *command], cwd=rules, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"] for group in load_yaml("rules/dispec.test.yml")["tests"] for case in group["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in alert_rules()}


def test_grafana_requires_a_password_from_the_operator() -> None:
    grafana = compose()["services"]["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert re.fullmatch(r"\$\{\w+:\?.*\}", grafana["GF_SECURITY_ADMIN_PASSWORD"])  # compose fails if it is not set


def test_the_parts_find_each_other() -> None:
    services = compose()["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])  # a fixed version
    (source,) = load_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert dashboard()["templating"]["list"][0]["current"]["value"] == source["uid"]
    (provider,) = load_yaml("grafana/provisioning/dashboards/dispec.yaml")["providers"]
    assert f"./monitoring/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    configuration = load_yaml("prometheus.yml")
    (job,) = configuration["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert all('job="' not in rule["expr"] or f'job="{job["job_name"]}"' in rule["expr"] for rule in alert_rules())
    (key,) = services["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{key}"
    assert key in services["server"]["secrets"]
    (rules,) = configuration["rule_files"]
    assert [path.name for path in DIRECTORY.glob(rules)] == ["dispec.rules.yml"]


@contextmanager
def prometheus(directory: Path, target: str, key: str):
    """A Prometheus with our configuration, but for what it scrapes, how often, and where its key lies."""
    configuration = load_yaml("prometheus.yml")
    configuration["global"]["scrape_interval"] = "1s"
    (job,) = configuration["scrape_configs"]
    job["static_configs"][0]["targets"] = [target]
    job["authorization"]["credentials_file"] = str(directory / "key")
    configuration["rule_files"] = [str(DIRECTORY / "rules" / "*.rules.yml")]
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
    options = ["--api-key", KEY, "--disaggregate", "--speculative-model", "ngram", "--slo", "default:ttft=100,itl=100"]
    with (
        serving(tmp_path / "tiny", *options) as server,
        prometheus(tmp_path, server.url.removeprefix("http://"), KEY) as url,
        under_load(server, key=KEY),
    ):
        assert until(lambda: query(url, 'up{job="dispec"} == 1'), "the first scrape") == [1]
        for expression in expressions():
            if NEEDS_FAILURES in expression:
                continue

            def has_data(asked: str = expression) -> bool:
                return not all(map(math.isnan, query(url, asked)))  # prefill workers have no ITL

            until(has_data, expression)
        for busy in ("rate(vllm:generation_tokens_total[10s])", "vllm:num_requests_running"):
            assert until(lambda asked=busy: query(url, f"{asked} > 0"), busy)
        assert query(url, 'up{job="dispec"} == 1') == [1]
        rules = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alert_rules()]
        assert "err" not in {rule["health"] for rule in rules}
