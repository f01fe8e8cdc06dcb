"""Docker, compose, systemd and Kubernetes files of `serving/deploy`: by the linters of each, and against the server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from litestar.testing import TestClient

from dispec.engine.option_fields import option_fields
from dispec.engine.options import EngineOptions
from dispec.serving.api.app import create_app
from dispec.serving.http.auth import OPEN_PATHS
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.commands import ROOT
from tests.paced_engine import PacedEngine
from tests.scripted_engine import thinking_tokenizer

DEPLOY = ROOT / "serving" / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("*Dockerfile"))
COMPOSE_FILES = [DEPLOY / "compose.yaml", DEPLOY / "compose.cuda.yaml"]
UNIT = DEPLOY / "systemd" / "dispec.service"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("server", "server-gpu", "disaggregated", "disaggregated-gpu")
DRAIN_SECONDS = ServerSettings.drain_timeout
OPTIONS = {name.replace("_", "-") for cls in (ServerSettings, EngineOptions) for name in option_fields(cls)}
OPTIONS |= {"api-key-file", "config"}
NGINX = DEPLOY / "nginx" / "dispec.conf"
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
KUBECTL = shutil.which("kubectl")


def checked(*command: str, cwd: Path = ROOT) -> str:
    """Run a linter that must find nothing; return its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def unknown_options(words: list[str]) -> list[str]:
    """Return the flags among the words that `dispec serve` does not have."""
    flags = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if flag not in OPTIONS]


# Docker


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("there is no hadolint: pip install -e '.[dev]' brings it")
    checked(hadolint, "--failure-threshold", "style", str(dockerfile))


def test_the_build_context_has_all_sources_of_the_package() -> None:
    lines = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    assert lines.index("**/.env") > lines.index("!serving")  # the keys of compose's server
    project = (ROOT / "pyproject.toml").read_text()
    folders = set(re.findall(r'^"?dispec[\w.]*"? = "(\w+)[/"]', project, re.MULTILINE))
    assert {"engine", "layers", "ops", "serving", "bench"} <= folders
    assert folders | {"pyproject.toml", "README.md", "LICENSE"} <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_image_runs_the_server_as_another_user() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER (\d+):\1$", last, re.MULTILINE)
    assert 'ENTRYPOINT ["dispec"]' in last
    assert "g++" in last
    (cache,) = re.findall(r"^VOLUME (\S+)$", last, re.MULTILINE)
    assert f"DISPEC_CACHE_DIR={cache}/" in last
    assert f"HF_HOME={cache}/" in last
    (command,) = re.findall(r"^CMD (\[.*\])$", last, re.MULTILINE)
    assert unknown_options(yaml.safe_load(command)) == []
    assert "/health" in last
    assert "/health" in OPEN_PATHS  # a probe has no key


# Compose


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_schema(path: Path) -> None:
    checked(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path))


def test_compose_starts_the_server_of_the_image() -> None:
    services = load(COMPOSE_FILES[0])["services"]
    server = services["server"]
    assert unknown_options(server["command"]) == []
    build = server["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert int(server["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS
    arguments = load(COMPOSE_FILES[1])["services"]["server"]["build"]["args"]
    assert set(arguments) <= set(re.findall(r"^ARG (\w+)", (ROOT / build["dockerfile"]).read_text(), re.MULTILINE))
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])


# nginx


def test_the_proxy_lets_through_what_the_server_takes() -> None:
    settings = dict(re.findall(r"^ +(\w+) ([^;{]+);", NGINX.read_text(), re.MULTILINE))
    assert int(settings["client_max_body_size"].removesuffix("m")) * 2**20 == ServerSettings.max_body_bytes
    assert settings["proxy_buffering"] == "off"
    assert float(settings["proxy_read_timeout"].removesuffix("s")) > ServerSettings.keep_alive_seconds


def test_the_proxy_hides_what_the_server_tells_of_itself() -> None:
    """Under every path that leads there: Litestar ignores slashes at the end."""
    (hidden,) = re.findall(r"location ~ (\S+) \{[^}]*return 404;", NGINX.read_text())
    engine = PacedEngine(thinking_tokenizer())
    with TestClient(create_app(engine, ServerSettings(), Metrics("tiny"))) as http:
        for path in ("/metrics", "/stats", "/load", "/server_info"):
            for written in (path, f"{path}/", f"{path}//"):
                assert http.get(written).status_code == 200
                assert re.search(hidden, written)
    assert not re.search(hidden, "/v1/models")


@pytest.mark.skipif(shutil.which("nginx", path=SBIN) is None, reason="there is no nginx")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_nginx_reads_the_proxy_settings(tmp_path: Path) -> None:
    names = ["-keyout", str(tmp_path / "dispec.key"), "-out", str(tmp_path / "dispec.pem")]
    checked("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm.example.com", *names)
    text = re.sub(r"/etc/ssl/(certs|private)", str(tmp_path), NGINX.read_text())
    text = re.sub(r"listen (\d+)", r"listen unix:\1.sock", text)  # the test opens the sockets
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n{text}\n}}\n")
    nginx = shutil.which("nginx", path=SBIN)
    assert nginx is not None
    checked(nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), cwd=tmp_path)


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/dispec/bin/dispec", sys.executable))  # it must exist
    (tmp_path / f"{UNIT.name}.d").mkdir()
    shutil.copy(DEPLOY / "systemd" / "gpu.conf", tmp_path / f"{UNIT.name}.d")
    checked("systemd-analyze", "verify", "--man=no", str(copy))
    shutil.rmtree(tmp_path / f"{UNIT.name}.d")
    security = checked("systemd-analyze", "security", "--offline=true", "--threshold=20", str(copy))
    assert "Overall exposure level" in security


def test_the_unit_fits_the_server() -> None:
    unit = dict(line.partition("=")[::2] for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line))
    assert unit["Type"] == "notify"
    assert unit["KillMode"] == "mixed"  # SIGTERM to the engines would end them before their requests
    assert float(unit["TimeoutStopSec"]) > DRAIN_SECONDS
    assert "MemoryDenyWriteExecute" not in unit
    assert unit["CacheDirectory"] in unit["Environment"]


# Kubernetes


def resources(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` sends for an overlay."""
    if KUBECTL is None:
        pytest.skip("there is no kubectl")
    return list(yaml.safe_load_all(checked(KUBECTL, "kustomize", str(KUBERNETES / overlay))))


def manifests() -> list[dict[str, Any]]:
    paths = [path for path in sorted(KUBERNETES.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def deployments() -> list[dict[str, Any]]:
    return [manifest for manifest in manifests() if manifest["kind"] == "Deployment"]


def test_manifests_have_kubernetes_schema() -> None:
    found = manifests()
    assert {manifest["kind"] for manifest in found} >= {"Deployment", "Service", "PersistentVolumeClaim"}
    for manifest in found:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_have_kubernetes_schema(overlay: str) -> None:
    found = resources(overlay)
    for resource in found:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    for container in containers(found):
        if container["name"] == "server":
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert has_gpu == overlay.endswith("-gpu")
            assert container["image"] == ("dispec:cuda" if has_gpu else "dispec:cpu")


def containers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pods = [resource["spec"]["template"]["spec"] for resource in found if resource["kind"] == "Deployment"]
    return [container for pod in pods for container in pod["containers"]]


def test_kustomizations_list_all_files() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        listed = load(path).get("resources", [])
        assert all((path.parent / name).exists() for name in listed)
        beside = {found.name for found in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert beside == {name for name in listed if not name.startswith("..")}


def test_pods_drain_and_take_no_variables_of_services() -> None:
    for deployment in deployments():
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        # Kubernetes would set DISPEC_PORT for a service named "dispec", and the server would read it as its own.
        assert pod["enableServiceLinks"] is False
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > pause + DRAIN_SECONDS
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]


def test_servers_have_known_options_and_open_probes() -> None:
    for container in containers(deployments()):
        if container["name"] != "server":
            continue
        assert unknown_options(container["args"]) == []
        variables = {entry["name"] for entry in container["env"] if entry["name"].startswith("DISPEC_")}
        assert {name.removeprefix("DISPEC_").lower().replace("_", "-") for name in variables} <= OPTIONS
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in OPEN_PATHS
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {"cache", "tmp", "shm"}


def test_services_and_policies_select_pods() -> None:
    labels = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in deployments()]
    services = [manifest for manifest in manifests() if manifest["kind"] == "Service"]
    for service in services:
        assert sum(service["spec"]["selector"].items() <= label.items() for label in labels) == 1
    ports = {service["metadata"]["name"]: service["spec"]["ports"][0]["port"] for service in services}
    (router,) = [container for container in containers(deployments()) if container["name"] == "router"]
    urls = re.findall(r"http://([\w-]+):(\d+)", " ".join(router["args"]))
    assert urls == [(name, str(ports[name])) for name in ("dispec-prefill", "dispec-decode")]
    (policy,) = [manifest for manifest in manifests() if manifest["kind"] == "NetworkPolicy"]
    open_ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    for role in ("prefill", "decode"):
        (worker,) = [one for one in deployments() if one["metadata"]["name"] == f"dispec-{role}"]
        (container,) = containers([worker])
        assert f"--role={role}" in container["args"]
        assert {port["containerPort"] for port in container["ports"]} == open_ports


def test_the_router_image_has_the_tested_version() -> None:
    (version,) = re.findall(r"vllm-router==([\d.]+)", (DEPLOY / "docker" / "router.Dockerfile").read_text())
    assert f'"vllm-router=={version}"' in (ROOT / ".ci" / "run").read_text()
    (router,) = [container for container in containers(deployments()) if container["name"] == "router"]
    assert router["image"].endswith(f":{version}")
