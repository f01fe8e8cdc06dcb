"""Imports point one way, without circles, and modules of the server process load no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parent.parent
# Each package may import itself and the packages before it. A module of `dispec.engine` or `dispec.serving` that is in
# no sub-package counts as a package.
PACKAGES = [
    "ops",
    "layers",
    "engine",
    "engine.errors",
    "engine.names_of_vllm",
    "engine.unknown_names",
    "engine.option_fields",
    "engine.json_file",
    "engine.machine",
    "engine.structured_output",
    "engine.sampling_params",
    "engine.transfer.interface",
    "engine.request_checks",
    "engine.options",
    "engine.dtypes",
    "engine.scheduling",
    "engine.text",
    "engine.loading",
    "engine.compression",
    "engine.transfer",
    "engine.execution",
    "engine.distributed",
    "engine.speculation",
    "engine.builder",
    "engine.engine",
    "engine.environment",
    "engine.api",
    "engine.process",
    "serving",
    "serving.client",
    "serving.observability",
    "serving.cluster",
    "serving.http",
    "serving.settings",
    "serving.chat_output",
    "serving.dashboard",
    "serving.api",
    "serving.service_manager",
    "serving.start_check",
    "serving.server",
    "serving.cli",
    "bench",
    "dispec",
]
HEAVY = ("torch", "transformers", "triton")
WITHOUT_TORCH = [
    "engine.scheduling",
    "engine.request_checks",
    "engine.options",
    "engine.loading.model_cache",
    "engine.loading.model_source",
    "engine.text",
    "serving",
]


def module_name(path: Path) -> str:
    """The name under which a file is imported, without `dispec.` in front; `dispec` for the root package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[:2] == ("serving", "dispec"):
        return ".".join(parts[1:]).removesuffix(".__init__")
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for folder in ("ops", "layers", "engine", "serving", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

MODULES = {f"dispec.{name}" for name in FILES}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def package_of(name: str) -> str:
    """The most specific package that a module is in."""
    packages = [package for package in PACKAGES if is_within(name, package)]
    found = max(packages, key=len)
    if found in ("engine", "serving"):
        assert name == found, f"{name} is in no package: add it to PACKAGES"
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that the file's text imports: at the top, in a function, for type checkers, or by name in a string.

    Such a string is an argument of `import_module` or of `python -m`.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("dispec.") in FILES else node.module
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            yield node.value


def own_imports(name: str) -> set[str]:
    """The modules of ours that a module imports, without `dispec.` in front."""
    names = {found for found in imported(FILES[name]) if is_within(found, "dispec")}
    return {"dispec" if found == "dispec" else found.removeprefix("dispec.") for found in names}


GRAPH = {name: own_imports(name) - {name} for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(package_of(name)) + 1]
    assert {found for found in GRAPH[name] if package_of(found) not in allowed} == set()


@pytest.mark.parametrize("name", FILES)
def test_our_modules_are_imported_by_their_installed_name(name: str) -> None:
    bare = {"engine", "layers", "ops", "serving", "bench", "tests"}
    assert not {found.split(".")[0] for found in imported(FILES[name])} & bare


def test_no_module_is_imported_by_a_computed_name() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                name = node.args[0] if node.args else None
                assert not isinstance(name, ast.JoinedStr | ast.BinOp), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_module_is_in_a_circle() -> None:
    left = set(GRAPH)
    while True:
        importers = {name for name in left if GRAPH[name] & left}
        imports = {found for name in left for found in GRAPH[name]}
        if importers & imports == left:
            break
        left &= importers & imports
    assert left == set()


@pytest.mark.parametrize(
    "name", [name for name in FILES if not is_within(name, "ops.triton") and not is_within(name, "bench")]
)
def test_only_the_kernels_import_triton(name: str) -> None:
    assert "triton" not in {found.split(".")[0] for found in imported(FILES[name])}


@pytest.mark.parametrize("name", [name for name in FILES if is_within(name, "serving")])
def test_serving_never_imports_torch_even_later(name: str) -> None:
    assert not {found.split(".")[0] for found in imported(FILES[name])} & set(HEAVY)


def test_modules_of_the_server_process_load_no_torch() -> None:
    modules = ["dispec", "dispec.__main__"]
    modules += [f"dispec.{name}" for name in FILES if any(is_within(name, package) for package in WITHOUT_TORCH)]
    # One process for all, one module after another, so that the first one to load it is named.
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not loaded, f"importing {{name}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
