"""Weights are declared once: what does not match the declaration is refused with its name."""

import functools
import importlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dispec import ops
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.types import Weights, unstack_layers
from dispec.layers.weight_specs import declare
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import WeightsError, dummy_weights, load_weights
from dispec.ops.cpu.library import has_packed_linear
from tests.allocations import peak_allocation
from tests.checkpoints import FAMILIES, VOCAB_SIZE, save_tiny
from tests.paged_model import PagedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[ModelConfig, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("qwen2")
    save_tiny(directory, "qwen2")
    found = find_checkpoint(directory)
    return found.config, dict(found.tensors())


def leaves(weights: Weights) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(weights) if isinstance(leaf, Tensor)]


def load(config: ModelConfig, tensors: list[tuple[str, Tensor]], dtype=torch.float32):
    return load_weights(config, iter(tensors), dtype, CPU)


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_the_declaration_names_exactly_what_transformers_saves(family, tmp_path):
    reference = save_tiny(tmp_path, family)
    config = find_checkpoint(tmp_path).config
    declared = {source.name: source.shape for spec in declare(config) for source in spec.sources}
    saved = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if config.tie_embeddings:
        saved.pop("lm_head.weight", None)
    assert declared == saved


def same_logits_as_transformers(directory) -> ModelConfig:
    """Load a directory with both, and compare what they make of a prompt; the config that it was loaded with."""
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    found = find_checkpoint(directory)
    weights = load(found.config, list(found.tensors()))
    prompt = list(range(7, 47))
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    (logits,) = PagedModel(weights, found.config, [prompt]).compute({0: len(prompt)})
    assert (logits - expected).abs().max().item() <= 1e-4
    return found.config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("kept", "is_tied"),
    [
        ("both, and they differ", False),
        ("both, and they are the same", True),
        ("the embedding", True),
        ("the head", True),
    ],
)
def test_tied_embeddings_are_what_the_files_hold(family, sharded, kept, is_tied, tmp_path):
    """The config says that they are tied; transformers believes the tensors."""
    save_tiny(tmp_path, family, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone()
    if kept == "both, and they differ":
        head[-1, -1] += 5  # the very last number: the whole of both is compared
    if kept != "the embedding":
        tensors["lm_head.weight"] = head
    if kept == "the head":
        del tensors["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (sharded and 'head' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert same_logits_as_transformers(tmp_path).tie_embeddings == is_tied


def test_a_head_of_another_shape_is_refused_though_the_config_ties(tmp_path):
    save_tiny(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    found = find_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=rf"'lm_head.weight' has shape \[100, 64\].*\[{VOCAB_SIZE}, 64\]"):
        load(found.config, list(found.tensors()))


@pytest.mark.parametrize(
    ("family", "left_out", "added"),
    [
        ("qwen3", ("head_dim",), {}),
        ("llama", ("num_key_value_heads",), {}),
        ("qwen3", (), {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}}),
        ("llama", (), {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    ],
)
def test_configs_with_gaps_and_additions_compute_what_transformers_does(family, left_out, added, tmp_path):
    shapes = {"head_dim": 128} if "head_dim" in left_out else {}
    shapes |= {"num_key_value_heads": 9} if "num_key_value_heads" in left_out else {}
    save_tiny(tmp_path, family, **shapes)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in left_out} | added
    (tmp_path / "config.json").write_text(json.dumps(raw))
    same_logits_as_transformers(tmp_path)


def test_a_rotation_base_that_rope_scaling_replaces_is_told(tmp_path, caplog):
    save_tiny(tmp_path, "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
    assert same_logits_as_transformers(tmp_path).rope_theta == 10000.0
    assert "rope_theta of 500000.0" in caplog.text


def test_order_does_not_matter(checkpoint):
    config, tensors = checkpoint
    forwards, backwards = load(config, list(tensors.items())), load(config, list(tensors.items())[::-1])
    for left, right in zip(leaves(forwards), leaves(backwards), strict=True):
        assert torch.equal(left, right)


@pytest.mark.smoke
def test_fused_rows_stand_in_order(checkpoint):
    config, tensors = checkpoint
    weights = load(config, list(tensors.items()))
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(unstack_layers(weights.layers)[1].attention.qkv, torch.cat(parts))


LAYOUTS = {
    "plain": (torch.float32, Packing()),
    "tiles": (torch.bfloat16, Packing()),
    "int8": (torch.bfloat16, Packing(ops.Quantization("int8"))),
    "int4": (torch.bfloat16, Packing(ops.Quantization("int4", 32))),
    "oneDNN's": (torch.bfloat16, Packing()),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    if request.param == "oneDNN's":
        monkeypatch.setattr(importlib.import_module("dispec.ops.linear"), "has_packed_linear", lambda: False)
        if not isinstance(ops.pack(torch.zeros(16, 16, dtype=torch.bfloat16)), ops.PackedWeight):
            pytest.skip("oneDNN packs nothing on this CPU")
    elif request.param != "plain" and not has_packed_linear():
        pytest.skip("this CPU has no kernel for tiles")
    return LAYOUTS[request.param]


def test_layers_are_what_each_would_be_alone(checkpoint, layout):
    config, tensors = checkpoint
    dtype, packing = layout
    weights = load_weights(config, iter(tensors.items()), dtype, CPU, packing=packing)
    x = torch.randn(3, config.hidden_size).to(dtype)
    assert len(unstack_layers(weights.layers)) == config.num_layers
    for number, layer in enumerate(unstack_layers(weights.layers)):
        prefix = f"model.layers.{number}"
        parts = [tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        alone = packing.pack(torch.cat(parts).to(dtype))
        assert torch.equal(ops.linear(x, layer.mlp.gate_up), ops.linear(x, alone))
        if isinstance(alone, ops.PackedWeight) and not alone.blocked.is_mkldnn:
            assert torch.equal(layer.mlp.gate_up.blocked, alone.blocked)
        assert torch.equal(layer.attention_norm, tensors[f"{prefix}.input_layernorm.weight"].to(dtype))
        assert (layer.attention.query_norm is None) == (f"{prefix}.self_attn.q_norm.weight" not in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", ["loaded", "random"])
def test_no_more_than_one_matrix_is_held_beside_the_weights(checkpoint, dtype, made):
    if dtype is torch.bfloat16 and not has_packed_linear():
        pytest.skip("this CPU has no kernel for tiles")
    config = replace(checkpoint[0], intermediate_size=704, num_layers=5, vocab_size=64)
    tensors = {source.name: torch.randn(source.shape) for spec in declare(config) for source in spec.sources}

    def make() -> Weights:
        return dummy_weights(config, dtype, CPU) if made == "random" else load(config, list(tensors.items()), dtype)

    weights = sum(leaf.nbytes for leaf in leaves(make()))
    largest = 2 * config.intermediate_size * config.hidden_size * dtype.itemsize
    # 8 KiB for results of operations on vectors: a matrix that is held too long has 32 KiB or more.
    assert peak_allocation(make) <= weights + (largest if dtype is torch.bfloat16 else 0) + 8192


def test_dummy_weights_of_ranks_are_parts_of_the_same(checkpoint):
    config, _ = checkpoint
    whole = dummy_weights(config, torch.float32, CPU)
    tensors = {}
    for spec in declare(config):
        weight = functools.reduce(getattr, spec.name.split("."), whole)
        rows = (weight if spec.layer is None else weight[spec.layer]).split([one.shape[0] for one in spec.sources])
        tensors |= {source.name: part for source, part in zip(spec.sources, rows, strict=True)}
    for rank in range(3):
        shard = Shard(rank, 3, "g")
        part = load_weights(config, iter(tensors.items()), torch.float32, CPU, shard=shard)
        made = dummy_weights(config, torch.float32, CPU, shard=shard)
        assert all(map(torch.equal, leaves(made), leaves(part)))


def test_missing(checkpoint):
    config, tensors = checkpoint
    kept = [item for item in tensors.items() if item[0] != "model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(WeightsError, match=r"'model\.layers\.1\.self_attn\.k_proj\.bias' is missing"):
        load(config, kept)


def test_missing_in_number(checkpoint):
    config, tensors = checkpoint
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with pytest.raises(WeightsError, match=rf"'model\.layers\.0\.input_layernorm\.weight' and {len(tensors) - 3} more"):
        load(config, [(name, tensors[name]) for name in names])


def test_left_over(checkpoint):
    config, tensors = checkpoint
    with pytest.raises(WeightsError, match=r"'model\.layers\.0\.extra\.weight'"):
        load(config, [*tensors.items(), ("model.layers.0.extra.weight", torch.zeros(3))])


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_twice(checkpoint, name):
    config, tensors = checkpoint
    with pytest.raises(WeightsError, match="twice"):
        load(config, [*tensors.items(), (name, tensors[name])])


def test_misshapen(checkpoint):
    config, tensors = checkpoint
    wrong = tensors | {"model.layers.2.mlp.up_proj.weight": torch.zeros(5, config.hidden_size)}
    with pytest.raises(
        WeightsError, match=rf"up_proj.weight' has shape \[5, 128\].*\[{config.intermediate_size}, 128\]"
    ):
        load(config, list(wrong.items()))


def test_dummy_weights_have_the_declared_shapes_and_are_reproducible(checkpoint):
    config, tensors = checkpoint
    loaded = load(config, list(tensors.items()))
    dummies = [dummy_weights(config, torch.float32, CPU, seed) for seed in (0, 0, 1)]
    assert [leaf.shape for leaf in leaves(loaded)] == [leaf.shape for leaf in leaves(dummies[0])]
    assert all(torch.equal(left, right) for left, right in zip(leaves(dummies[0]), leaves(dummies[1]), strict=True))
    assert not torch.equal(dummies[0].embedding, dummies[2].embedding)


def test_bfloat16_matrices_are_packed_and_the_tied_head_too(tmp_path):
    save_tiny(tmp_path, "qwen3")
    found = find_checkpoint(tmp_path)
    assert found.config.tie_embeddings
    weights = load(found.config, list(found.tensors()), torch.bfloat16)
    packs = isinstance(ops.pack(torch.zeros(16, 16, dtype=torch.bfloat16)), ops.PackedWeight)
    assert isinstance(weights.lm_head, ops.PackedWeight) == packs
    assert isinstance(unstack_layers(weights.layers)[0].mlp.down, ops.PackedWeight) == packs
    if has_packed_linear():
        assert weights.embedding is weights.lm_head
    table = dict(found.tensors())["model.embed_tokens.weight"].bfloat16()
    ids = torch.tensor([0, 5, 31, 32, len(table) - 1])
    assert torch.equal(ops.embedding(weights.embedding, ids, found.config.hidden_size), table[ids])
