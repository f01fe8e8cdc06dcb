"""Imports point one way, serving → engine → layers → ops, and what needs no torch does not load it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("ops", "layers", "engine", "serving")  # each may import itself and what comes before it
FILES = sorted(path for package in LAYERS for path in (ROOT / package).rglob("*.py"))
OURS = {*LAYERS, "bench", "tests"}

WITHOUT_TORCH = [
    "engine",
    "dispec.engine.scheduling.scheduler",
    "dispec.engine.scheduling.sequence",
    "dispec.engine.scheduling.block_pool",
    "dispec.engine.options",
]
WITHOUT_TORCH += ["dispec.engine.loading.model_source"]
HEAVY = ("torch", "transformers", "triton")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that the file's text imports, at the top or inside a function."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(package) + 1]
    found = {name.split(".")[0] for name in imported_modules(path)} & OURS
    assert found <= set(allowed), f"{package} may import {allowed}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.is_relative_to(ROOT / "ops" / "triton")], ids=name_of
)
def test_only_the_kernels_import_triton(path: Path) -> None:
    assert "triton" not in {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "serving")], ids=name_of)
def test_serving_never_imports_torch_even_later(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported_modules(path)} & set(HEAVY)


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


def test_nothing_of_the_front_process_loads_torch() -> None:
    modules = WITHOUT_TORCH + [module_name(path) for path in FILES if path.is_relative_to(ROOT / "serving")]
    # One process for all, one module after another, so that the first one to blame is named.
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not loaded, f"importing {{name}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
