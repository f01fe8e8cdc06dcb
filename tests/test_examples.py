"""Every block of engine/api/EXAMPLES.md runs, and prints what the page says."""

import contextlib
import io
import re

import pytest

from tests.commands import ROOT

PAGE = ROOT / "engine/api/EXAMPLES.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_prints_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = _BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    kinds = [kind for kind, _ in blocks]
    assert kinds == ["python", "text"] * (len(blocks) // 2)
    assert len(blocks) > 20
    names: dict[str, object] = {}
    for (_, source), (_, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, str(PAGE), "exec"), names)
        assert printed.getvalue() == expected, source
