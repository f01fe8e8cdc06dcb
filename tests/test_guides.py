"""The Python of guides runs as written, beside a server of the default model."""

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from dispec.engine.loading.default_model import BUILT_IN_MODEL
from dispec.layers import config
from tests import checkpoints
from tests.commands import ROOT
from tests.paged_model import PagedModel
from tests.servers import Server, default_model_server
from tests.test_model import make_case

GUIDES = sorted((ROOT / "serving/guides").glob("*.md"))
MAX_LINES = 90


def python_of(name: str) -> str:
    """Return a guide's blocks of Python, one after the other."""
    text = (ROOT / "serving/guides" / f"{name}.md").read_text(encoding="utf-8")
    return "\n".join(textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def run(name: str, url: str = "", **names: Any) -> dict[str, Any]:
    """Run a guide's Python and return its variables. url: of the server in place of the one that the guide names."""
    code = python_of(name).replace("http://127.0.0.1:8000", url)
    variables = {"__name__": name, **names}
    exec(compile(code, f"{name}.md", "exec"), variables)
    return variables


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with default_model_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_is_short_and_its_python_is_valid(guide: Path) -> None:
    assert len(guide.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    ast.parse(python_of(guide.stem))


@pytest.mark.slow
def test_structured_output_with_langchain(served: Server) -> None:
    found = run("structured-output-langchain", served.url)
    city = found["city"]
    assert isinstance(city, found["City"])
    assert len(city.name) <= 30
    assert isinstance(found["partial"], found["City"])
    assert {call["name"] for call in found["call"].tool_calls} == {"get_weather"}
    assert all(call["args"]["unit"] in ("C", "F") for call in found["call"].tool_calls)
    assert found["answer"].content
    assert found["size"] in ("small", "medium", "large")
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", found["date"].content)


@pytest.mark.slow
def test_the_first_request_of_the_readme_is_answered_well(served: Server) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"curl http://127.0.0.1:8000/v1/chat/completions .*?-d '(.*?)'", text, re.DOTALL)
    assert "temperature" not in body
    answer = served.post("/v1/chat/completions", json.loads(body)).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert served.get("/model_info").json()["preferred_sampling_params"] == BUILT_IN_MODEL.generation_config


@pytest.mark.slow
def test_speculation() -> None:
    rates = run("speculation")["rates"]
    assert rates.keys() == {None, "ngram", "smollm2-draft"}
    assert all(rate > 0 for rate in rates.values())


def test_adding_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families = dict(config._FAMILIES)
    monkeypatch.setattr(config, "_FAMILIES", families)
    monkeypatch.setitem(checkpoints._CONFIGS, "mistral", MistralConfig)
    monkeypatch.setitem(checkpoints._SHAPES, "mistral", checkpoints._SHAPES["llama"])
    run("adding-a-model", _FAMILIES=families, _Family=config._Family, _LLAMA_DEFAULTS=config._LLAMA_DEFAULTS)
    case = make_case(tmp_path, "mistral", lengths=(37, 5), sliding_window=None)
    assert case.config.architecture == "MistralForCausalLM"
    assert case.config.num_kv_heads == 3
    paged = PagedModel(case.weights, case.config, case.prompts)
    for sequence, logits in enumerate(paged.compute({0: 37, 1: 5})):
        case.assert_close(sequence, 0, logits)
