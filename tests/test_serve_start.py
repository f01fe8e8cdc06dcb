"""`dispec serve` refuses options and models in the words of `generate`, before it starts a process."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest

from dispec.serving.client import engine_supervisor
from tests.checkpoints import save_tiny, save_tiny_gguf, tiny_model
from tests.commands import Result, dispec, eager, one_sentence
from tests.engine_clients import one_thread_each as one_thread_each


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3")
    return directory


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@contextmanager
def no_process() -> Iterator[None]:
    """Fail if a server starts an engine process."""

    def start(*args: object) -> None:
        raise AssertionError("a process was started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_supervisor, "EngineProcess", start)
        yield


def refused(*args: str) -> str:
    """Return the sentence with which both commands refuse these options; `serve` starts no process."""
    generated = dispec("generate", "hi", *args)
    with no_process():
        served = dispec("serve", "--port", "0", *args)
    assert (served.code, generated.code) == (2, 2), served.err + generated.err
    assert one_sentence(served) == one_sentence(generated)
    return one_sentence(served)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "/no/such"], "there is no model at /no/such: give"),
        (["--model", "smolm2"], "there is no model at smolm2 (did you mean smollm2?): give"),
        (["--model", "someone/unknown"], "someone/unknown is not in the local cache and the hub cannot be reached"),
        (["--speculative-model", "smollm2-darft"], "smollm2-darft (did you mean smollm2-draft?)"),
        (["--speculative-model", "ngrams"], "ngrams (did you mean ngram?)"),
        (["--speculative-model", "someone/unknown"], "someone/unknown is not in the local cache"),
        (["--dtype", "int4"], "dtype is 'int4', must be one of auto, bfloat16, float16, float32"),
        (["--load-format", "gguf"], "load_format is 'gguf', must be one of auto, dummy"),
        (["--compile", "later"], "compile is 'later', must be one of"),
        (["--device", "tpu"], "device is 'tpu', must be"),
        (["--kv-cache-memory", "much"], "kv_cache_memory is 'much', must be"),
        (["--threads", "0"], "threads is 0, must be"),
        (["--kv-transfer", "pigeon"], "kv_transfer is 'pigeon', must be one of"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size is 0, must be between 1 and 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_as_generate_refuses_them(args: list[str], said: str, model: Path) -> None:
    assert said in refused(*([] if "--model" in args else ["--model", str(model)]), *args)


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def with_another_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))


@pytest.mark.parametrize("damage", [without_config, without_weights, with_another_architecture])
@pytest.mark.parametrize("option", ["--model", "--speculative-model"])
def test_a_directory_that_lacks_something_is_refused(damage, option: str, model: Path, tmp_path: Path) -> None:
    damage(copy := Path(shutil.copytree(model, tmp_path / "copy")))
    assert str(copy) in refused(*(["--model", str(model)] if option != "--model" else []), option, str(copy))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--disaggregate", "--model", "smolm2"], "there is no model at smolm2"),
        (["--role", "decode", "--model", "smolm2"], "there is no model at smolm2"),
        (["--disaggregate", "--dtype", "int4"], "dtype is 'int4'"),
        (["--disaggregate", "--threads", "0"], "threads is 0, must be"),
        (["--disaggregate", "--tensor-parallel-size", "2"], "tensor_parallel_size is 2, must be 1 with disaggregate"),
        (["--role", "prefill", "--tensor-parallel-size", "2"], "must be 1 with role 'prefill'"),
        (["--disaggregate", "--kv-transfer-port", "4000"], "kv_transfer_port is 4000, must be left out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_workers_are_refused_before_the_first_one_starts(args: list[str], said: str) -> None:
    with no_process():
        result = dispec("serve", "--port", "0", *args)
    assert result.code == 2
    assert said in one_sentence(result)


def serve_and_generate(*args: str) -> tuple[Result, Result]:
    return dispec("serve", "--port", "0", "--quiet", *args), dispec("generate", "hi", "--quiet", *args)


def truncated_gguf(model: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "broken.gguf"
    save_tiny_gguf(path, tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    path.write_bytes(path.read_bytes()[:-100_000])
    return eager(str(path))


def little_memory(model: Path, tmp_path: Path) -> list[str]:
    return ["--model", str(model), "--enforce-eager", "--kv-cache-memory", "1"]


def contradicting_config(model: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(model, tmp_path / "copy")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    return eager(str(tmp_path / "copy"))


@pytest.mark.parametrize("bad", [truncated_gguf, little_memory, contradicting_config])
def test_what_the_engine_process_finds_is_told_as_generate_tells_it(bad, model: Path, tmp_path: Path) -> None:
    served, generated = serve_and_generate(*bad(model, tmp_path))
    assert (served.code, generated.code) == (2, 2)
    assert one_sentence(served) == one_sentence(generated)
    assert "unexpected" not in served.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kv-transfer-host", "no such host", "--kv-transfer-secret", "0123456789abcdef"], "no address"),
        (["--kv-transfer", "cuda_ipc"], "kv_transfer allows cuda_ipc: none can be used here"),
    ],
)
def test_a_transfer_that_cannot_be_is_one_sentence(args: list[str], said: str, model: Path) -> None:
    result = dispec("serve", "--port", "0", "--quiet", "--role", "decode", *eager(str(model)), *args)
    assert result.code == 2
    assert said in one_sentence(result)
