"""Finding models: whole ones give every tensor, and each kind of damage is told in one sentence."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from dispec import LLM, SamplingParams
from dispec.engine.loading.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from dispec.engine.loading.model_source import check_model
from dispec.layers.config import UnsupportedModelError
from tests.checkpoints import EOS_TOKEN_ID, FAMILIES, save_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    save_tiny(directory, "llama", max_shard_size="200KB")
    return directory


@pytest.fixture
def copy(sharded, tmp_path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "tiny-llama"))


def refusal(model: str | Path, error: type[Exception] = CheckpointError) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(error) as caught:
        find_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("max_shard_size", "dtype"), [(None, torch.float32), ("200KB", torch.bfloat16)])
def test_every_tensor_comes_once_as_it_is(family, max_shard_size, dtype, tmp_path):
    directory = tmp_path / family
    model = save_tiny(directory, family, seed=3, max_shard_size=max_shard_size, dtype=dtype)
    assert (directory / "model.safetensors").exists() == (max_shard_size is None)
    checkpoint = find_checkpoint(directory)
    expected = dict(model.state_dict())
    if family == "qwen3":  # tied
        del expected["lm_head.weight"]
    tensors = list(checkpoint.tensors())
    assert sorted(name for name, _ in tensors) == sorted(expected)
    for name, tensor in tensors:
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert checkpoint.name == family
    assert checkpoint.directory == directory
    assert checkpoint.config.tie_embeddings == (family == "qwen3")
    assert find_checkpoint(str(directory)) == checkpoint


def test_derived_tensors_are_left_out(tmp_path):
    save_tiny(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors")
    names = {name for name, _ in find_checkpoint(tmp_path).tensors()}
    assert names == set(tensors) - {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_tensors_outlive_the_iteration(sharded):
    tensors = dict(find_checkpoint(sharded).tensors())
    again = dict(find_checkpoint(sharded).tensors())
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        # Always the tokenizer's, <|im_end|>, and the others that the files name.
        ({"eos_token_id": [7, 5, 7]}, {"eos_token_id": 3}, (EOS_TOKEN_ID, 7, 5)),
        ({"eos_token_id": 9}, {"eos_token_id": 3}, (EOS_TOKEN_ID, 9)),
        ({"eos_token_id": [0, EOS_TOKEN_ID]}, {"eos_token_id": 3}, (EOS_TOKEN_ID, 0)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (EOS_TOKEN_ID, 3)),
        (None, {"eos_token_id": [3, 4]}, (EOS_TOKEN_ID, 3, 4)),
        (None, {"eos_token_id": None}, (EOS_TOKEN_ID,)),
    ],
)
def test_end_of_sequence_tokens(copy, generation, config, expected):
    if generation is None:
        (copy / "generation_config.json").unlink()
    else:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | config))
    assert find_checkpoint(copy).eos_token_ids == expected


def test_bad_end_of_sequence_token(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert "generation_config.json has eos_token_id '</s>'" in refusal(copy)


def test_missing_shard(copy):
    (copy / "model-00002-of-00009.safetensors").unlink()
    assert "model-00002-of-00009.safetensors is missing" in refusal(copy)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda contents: contents[:-100], "not fully covered"),
        (lambda contents: contents[:50], "not a whole safetensors file"),
        (lambda contents: b"", "not a whole safetensors file"),
        (lambda contents: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_damaged_shard(copy, damage, told):
    shard = copy / "model-00003-of-00009.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    message = refusal(copy)
    assert shard.name in message
    assert told in message


def test_tensor_in_two_shards(copy):
    first, second = copy / "model-00001-of-00009.safetensors", copy / "model-00002-of-00009.safetensors"
    one = load_file(first)
    save_file(load_file(second) | one, second)
    message = refusal(copy)
    assert next(iter(one)) in message
    assert first.name in message
    assert second.name in message


def test_an_index_of_missing_tensors(copy):
    index = copy / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00009.safetensors"
    index.write_text(json.dumps(contents))
    assert "lacks model.layers.9.mlp.up_proj.weight" in refusal(copy)


@pytest.mark.parametrize("contents", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../secret"}}'])
def test_broken_index(copy, contents):
    (copy / "model.safetensors.index.json").write_text(contents)
    assert "model.safetensors.index.json" in refusal(copy)


@pytest.mark.parametrize("contents", ["{", "", "[1]", "\udcff"])
def test_broken_config(copy, contents):
    (copy / "config.json").write_bytes(contents.encode("utf-8", "surrogateescape"))
    assert "config.json" in refusal(copy)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": []}, {"rope_parameters": 3}]
)
def test_invalid_config_values(copy, change):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | change))
    assert "config.json is invalid" in refusal(copy)


def test_unsupported_model_is_named_with_its_place(copy):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"architectures": ["MambaForCausalLM"]}))
    message = refusal(copy, UnsupportedModelError)
    assert "MambaForCausalLM" in message
    assert str(copy) in message


def test_no_config(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert f"give the file {tmp_path / 'model.gguf'}" in refusal(tmp_path)


def test_no_weights(copy):
    for path in copy.glob("model*"):
        path.unlink()
    assert "neither model.safetensors nor" in refusal(copy)


def test_pickled_weights_are_not_unpickled(copy):
    for path in copy.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": torch.ones(3)}, copy / "pytorch_model.bin")
    assert "convert them to safetensors" in refusal(copy)


def test_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(copy)


def test_nothing_there(tmp_path):
    assert "there is no model at" in refusal(tmp_path / "absent")
    assert "there is no model at" in refusal("absent")
    assert "there is no model at" in refusal("./models/absent")
    assert "there is no model at" in refusal("models/absent.gguf")
    (tmp_path / "weights.txt").write_text("")
    assert "is not a .gguf file" in refusal(tmp_path / "weights.txt")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def put_into_hub_cache(cache: Path, directory: Path, without: str = "nothing") -> Path:
    snapshot = cache / "models--someone--tiny-llama" / "snapshots" / ("0" * 40)
    shutil.copytree(directory, snapshot, ignore=shutil.ignore_patterns(without))
    refs = cache / "models--someone--tiny-llama" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    return snapshot


def test_hub_id_from_the_cache(sharded, hub_cache):
    snapshot = put_into_hub_cache(hub_cache, sharded)
    checkpoint = find_checkpoint("someone/tiny-llama")
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.name == "someone/tiny-llama"
    assert checkpoint.directory == snapshot
    assert len(list(checkpoint.tensors())) == len(list(find_checkpoint(sharded).tensors()))


def test_half_downloaded_hub_model(sharded, hub_cache):
    put_into_hub_cache(hub_cache, sharded, without="model-00004*")
    assert "model-00004-of-00009.safetensors is missing" in refusal("someone/tiny-llama")


def test_hub_offline(hub_cache, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    message = refusal("someone/tiny-llama")
    assert "someone/tiny-llama is not in the local cache and the hub cannot be reached: connect, or" in message
    assert "OFFLINE" not in message
    for name in ("TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        assert f"is not in the local cache and {name} is set: unset it, or give" in refusal("someone/tiny-llama")


@pytest.mark.parametrize("where", ["directory", "hub"])
def test_config_and_tokenizer_are_enough_without_weights(sharded, hub_cache, tmp_path, where):
    bare = Path(shutil.copytree(sharded, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*")))
    model: str | Path = bare
    if where == "hub":
        put_into_hub_cache(hub_cache, bare)
        model = "someone/tiny-llama"
    assert "has neither model.safetensors nor" in refusal(model)
    check_model(model, without_weights=True)
    with pytest.raises(CheckpointError, match="has neither"):
        find_checkpoint(model)
    found, whole = find_checkpoint(model, without_weights=True), find_checkpoint(sharded)
    assert (found.config, found.eos_token_ids, found.files) == (whole.config, whole.eos_token_ids, ())
    llm = LLM(model, load_format="dummy", enforce_eager=True, kv_cache_memory="1MiB", dtype="float32")
    known = LLM(sharded, load_format="dummy", enforce_eager=True, kv_cache_memory="1MiB", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert llm.generate("the sea", params)[0].outputs[0].text == known.generate("the sea", params)[0].outputs[0].text


def test_only_the_small_files_of_a_hub_model_are_fetched_without_weights(sharded, monkeypatch):
    patterns: list[str] = []

    def fetch(model: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    find_checkpoint("someone/tiny-llama", without_weights=True)
    assert not [pattern for pattern in patterns if "safetensors" in pattern]
    find_checkpoint("someone/tiny-llama")
    assert "model.safetensors" in patterns


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM2", "smollm2"),
        ("{models}/tiny-lama", "{models}/tiny-llama"),
        ("{models}/tiny.guf", "{models}/tiny.gguf"),
        ("someone/tiny-lama", "someone/tiny-llama"),
        ("{models}/elephant", None),
        ("{models}/notes", None),
        ("gpt-5", None),
        ("/no/such/tiny-llama", None),
    ],
)
def test_the_closest_name_is_suggested(sharded, hub_cache, tmp_path, wrong, right):
    models = tmp_path / "models"
    shutil.copytree(sharded, models / "tiny-llama")
    (models / "tiny.gguf").touch()
    (models / "notes.d").mkdir()  # no model
    put_into_hub_cache(hub_cache, sharded)
    message = refusal(wrong.format(models=models))
    assert ("did you mean" in message) == (right is not None)
    if right is not None:
        assert f"(did you mean {right.format(models=models)}?)" in message


class _EmptyHub(BaseHTTPRequestHandler):
    """Answers as the hub does for what it does not have, or does not show to everyone."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 (the name that http.server asks for)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), _EmptyHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_does_not_know_it(empty_hub):
    assert "neither a local directory nor a model on the hub" in refusal("someone/unknown")
    assert "grants someone/gated on request only" in refusal("someone/gated")
