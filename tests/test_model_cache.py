"""`dispec models`, `pull` and `rm`: what is on disk, downloads from a hub on this machine, and removal."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
from safetensors import safe_open

from dispec.engine.loading import default_model
from dispec.engine.loading.default_model import BUILT_IN_MODEL
from dispec.engine.loading.model_cache import model_facts, weights_on_disk
from dispec.serving.cli.console import parameter_count
from tests.checkpoints import save_tiny, save_tiny_gguf, tiny_model
from tests.commands import COMMAND, ROOT, dispec, one_sentence

COMMIT = "0" * 40
LLAMA = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3")
    return directory


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, of DiSpec in `cache` and of the hub in `hub`; without network."""
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_into_hub_cache(caches: Path, directory: Path, model: str) -> int:
    """Place the files of a directory as the hub's client does: blobs, and links to them. Returns their bytes."""
    repository = caches / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in directory.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return sum(blob.stat().st_size for blob in (repository / "blobs").iterdir())


def listed() -> dict[str, dict[str, Any]]:
    result = dispec("models", "--json")
    assert result.code == 0
    return {model["name"]: model for model in json.loads(result.out)}


def num_weights(directory: Path) -> int:
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


# The table


def test_an_empty_cache() -> None:
    result = dispec("models")
    assert (result.code, result.out) == (0, "")
    assert "`dispec pull smollm2` downloads" in result.err


def test_models_of_all_places(caches: Path, tiny: Path) -> None:
    size = put_into_hub_cache(caches, tiny, "someone/tiny")
    encoder = caches / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    put_into_hub_cache(caches, encoder, "someone/encoder")
    partial = Path(shutil.copytree(tiny, caches / "partial", ignore=shutil.ignore_patterns("*.safetensors")))
    put_into_hub_cache(caches, partial, "someone/partial")
    (caches / "hub" / "datasets--someone--texts" / "snapshots").mkdir(parents=True)
    placed = caches / "cache" / "models"
    placed.mkdir(parents=True)
    save_tiny_gguf(placed / "small.gguf", tiny_model("llama", **LLAMA), lambda name: gguf.GGMLQuantizationType.Q4_0)

    found = listed()
    assert set(found) == {"someone/tiny", "someone/encoder", "someone/partial", str(placed / "small.gguf")}
    assert found["someone/tiny"]["architecture"] == "Qwen3ForCausalLM"
    assert found["someone/tiny"]["weights"] == "float32"
    assert found["someone/tiny"]["parameters"] == num_weights(tiny)
    assert found["someone/tiny"]["size_bytes"] == size
    assert Path(found["someone/tiny"]["path"]).joinpath("config.json").is_file()
    assert found["someone/encoder"]["problem"].startswith("unsupported: architecture")
    assert found["someone/partial"]["problem"].startswith("incomplete: has neither model.safetensors nor")
    file = found[str(placed / "small.gguf")]
    assert (file["architecture"], file["weights"]) == ("LlamaForCausalLM", "GGUF Q4_0")
    assert file["parameters"] == sum(weight.numel() for weight in tiny_model("llama", **LLAMA).parameters())

    lines = dispec("models").out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *found]
    assert len({line.index(column) for line, column in zip(lines, ("MODEL", "Llama"), strict=False)}) == 1
    assert sum(str(caches / "hub") in line for line in dispec("models", "-v").out.splitlines()) == 3


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("ties", [True, False])
def test_parameters_are_counted_as_transformers_counts(tmp_path: Path, family: str, ties: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=ties)
    model.save_pretrained(tmp_path)
    assert model_facts(tmp_path).num_parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999"), (134_515_008, "135M"), (1_543_714_304, "1.5B"), (70_553_706_496, "70.6B")]
)
def test_numbers_of_parameters_read_as_in_names_of_models(count: int, shown: str) -> None:
    assert parameter_count(count) == shown


def test_the_format_of_weights_on_disk(caches: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_into_hub_cache(caches, tiny, "someone/tiny")
    assert weights_on_disk(str(tiny)) == weights_on_disk("someone/tiny") == "float32"
    assert weights_on_disk("smollm2") is weights_on_disk("someone/else") is weights_on_disk("/no/such/model") is None
    monkeypatch.delenv("DISPEC_CACHE_DIR")
    if BUILT_IN_MODEL.is_in(default_model.cache_directory()):
        assert weights_on_disk("smollm2") == "GGUF Q4_1 and Q8_0"
        assert listed()["smollm2"]["weights"] == "GGUF Q4_1 and Q8_0, dequantised to bfloat16 on load"


# Removal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "is_removed"), [("y\n", True), ("n\n", False), (None, True)])
def test_removing_asks_on_a_terminal(
    caches: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, is_removed: bool
) -> None:
    size = put_into_hub_cache(caches, tiny, "someone/tiny")
    put_into_hub_cache(caches, tiny, "someone/other")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    result = dispec("rm", "someone/tiny", *([] if answer else ["--yes"]))
    assert result.code == (0 if is_removed else 1)
    assert ("removed" in result.err) == is_removed
    assert ("Servers that run it" in result.err) == (answer is not None)
    assert set(listed()) == {"someone/other"} | (set() if is_removed else {"someone/tiny"})
    if is_removed:
        assert f"{size / 2**20:.1f} MiB freed" in result.err
        assert not (caches / "hub" / "models--someone--tiny").exists()


def test_removing_from_our_cache(caches: Path, tiny: Path) -> None:
    placed = caches / "cache" / "models"
    placed.mkdir(parents=True)
    shutil.copytree(tiny, placed / "tiny")
    (placed / "small.gguf").write_bytes(b"GGUF")
    for name in ("tiny", "small.gguf"):
        assert dispec("rm", str(placed / name), "--yes").code == 0
        assert not (placed / name).exists()
    assert tiny.is_dir()


@pytest.mark.parametrize("name", ["someone/tinny", "smollm2", "/etc", "."])
def test_what_is_not_cached_is_not_removed(caches: Path, tiny: Path, name: str) -> None:
    put_into_hub_cache(caches, tiny, "someone/tiny")
    result = dispec("rm", name, "--yes")
    assert result.code == 2
    assert "is not cached" in one_sentence(result)
    assert ("did you mean someone/tiny?" in result.err) == (name == "someone/tinny")
    assert set(listed()) == {"someone/tiny"}


# Download


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that a download uses. files: of each model; requested: the files that were read."""

    files: dict[str, Path]
    requested: list[str]

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/")
        if parts[1:3] == ["api", "models"] and "/".join(parts[3:5]) in self.files:
            directory = self.files["/".join(parts[3:5])]
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in directory.iterdir()
            ]
            siblings = [{"rfilename": file["path"]} for file in files]
            about: Any = {"id": directory.name, "sha": COMMIT, "siblings": siblings}
            # Versions of the client differ in which of both they read.
            self._answer(json.dumps(files if "tree" in parts else about).encode())
        elif "resolve" in parts and "/".join(parts[1:3]) in self.files:
            file = self.files["/".join(parts[1:3])] / parts[-1]
            if self.command == "GET":
                self.requested.append(file.name)
            contents = file.read_bytes()
            self._answer(contents, ETag=f'"{hashlib.sha256(contents).hexdigest()}"')
        else:
            self._answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 (the name that http.server asks for)

    def _answer(self, contents: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(contents)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(contents)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with someone/tiny and someone/encoder, and the names of the files that were read there."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    (encoder / "model.safetensors").write_bytes(b"weights")
    requested: list[str] = []
    handler = type("Handler", (Hub,), {"files": {"someone/tiny": tiny, "someone/encoder": encoder}})
    handler.requested = requested  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


def pulled(address: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `dispec pull` in a process that reads the address of the hub when it imports the hub's client."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [*COMMAND, "pull", *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_pulling_a_model(hub: tuple[str, list[str]], tiny: Path) -> None:
    address, requested = hub
    done = pulled(address, "someone/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("someone/tiny: ")
    assert requested[-1] == "model.safetensors"
    snapshot = Path(listed()["someone/tiny"]["path"])
    assert (snapshot / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    del requested[:]
    assert pulled(address, "someone/tiny", "--quiet").stderr == ""
    assert requested == []


def test_an_unsupported_model_is_refused_before_its_weights(hub: tuple[str, list[str]]) -> None:
    address, requested = hub
    done = pulled(address, "someone/encoder")
    assert done.returncode == 2
    assert "not supported: architecture" in done.stderr
    assert requested == ["config.json"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("someone/unknown", "someone/unknown is neither a local directory nor a model on the hub"),
        ("smolm2", "there is no model at smolm2 (did you mean smollm2?)"),
        (".", "is on this machine: only built-in models and hub ids (owner/name) are downloaded"),
    ],
)
def test_what_cannot_be_pulled(hub: tuple[str, list[str]], name: str, said: str) -> None:
    done = pulled(hub[0], name)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_pulling_without_network() -> None:
    done = pulled("http://127.0.0.1:9", "someone/tiny")
    assert done.returncode == 2
    assert "someone/tiny is not in the local cache and the hub cannot be reached: connect" in done.stderr
