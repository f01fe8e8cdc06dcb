"""`dispec bench dashboard`: pictures of the dashboard of a tiny model."""

import shutil
import sys

import pytest

from dispec.bench import cli
from tests.checkpoints import save_tiny
from tests.commands import ROOT

PNG = b"\x89PNG\r\n\x1a\n"


def test_what_is_missing_or_wrong_is_said(tmp_path, monkeypatch, capsys) -> None:
    assert cli.main(["dashboard", "--output", str(tmp_path), "--picture", "sepia"]) == 2
    assert capsys.readouterr().err == "error: --picture is 'sepia', must be one of idle, light, dark, phone, dead\n"
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    assert cli.main(["dashboard", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: bench dashboard needs playwright: pip install playwright\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_pictures_are_taken(tmp_path, monkeypatch) -> None:
    pytest.importorskip("playwright")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_tiny(tmp_path / "tiny", "llama")
    pictures = tmp_path / "pictures"
    options = ["--model", str(tmp_path / "tiny"), "--output", str(pictures), "--seconds", "0", "--concurrency", "2"]
    cli.main(["dashboard", *options, "--picture", "phone", "--picture", "dead"])
    assert {path.name for path in pictures.iterdir()} == {"dashboard-phone.png", "dashboard-dead.png"}
    assert all(path.read_bytes().startswith(PNG) for path in pictures.iterdir())


def test_the_pictures_of_the_readme_are_small() -> None:
    for scheme in ("light", "dark"):
        picture = (ROOT / f"serving/dashboard/dashboard-{scheme}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) < 200_000
