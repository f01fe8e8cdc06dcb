"""Fixtures of a module: a tiny checkpoint with a tokenizer, and an `LLM` of it."""

from pathlib import Path

import pytest

from dispec import LLM
from tests.checkpoints import save_tiny, save_tokenizer
from tests.small_engine import make


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path, "llama")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return make(directory)
