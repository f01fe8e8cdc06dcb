"""Weights are declared once: what does not match the declaration is refused with its name."""

import pytest
import torch
from torch import Tensor

import ops
from engine.checkpoint import find_checkpoint
from layers.config import ModelConfig
from layers.types import Weights
from layers.weights import WeightsError, declare, dummy_weights, load_weights
from ops.cpu.library import has_linear
from tests.checkpoints import FAMILIES, save_tiny

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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_declaration_names_exactly_what_transformers_saves(family, tmp_path):
    reference = save_tiny(tmp_path, family)
    config = find_checkpoint(tmp_path).config
    declared = {source.name: source.shape for spec in declare(config) for source in spec.sources}
    saved = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if config.tie_embeddings:
        saved.pop("lm_head.weight", None)
    assert declared == saved


def test_order_does_not_matter(checkpoint):
    config, tensors = checkpoint
    forwards, backwards = load(config, list(tensors.items())), load(config, list(tensors.items())[::-1])
    for left, right in zip(leaves(forwards), leaves(backwards), strict=True):
        assert torch.equal(left, right)


def test_fused_rows_stand_in_order(checkpoint):
    config, tensors = checkpoint
    weights = load(config, list(tensors.items()))
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights.blocks[1].attention.qkv, torch.cat(parts))


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
    packs = isinstance(ops.pack(torch.zeros(16, 16, dtype=torch.bfloat16)), ops.Packed)
    assert isinstance(weights.lm_head, ops.Packed) == packs
    assert isinstance(weights.blocks[0].mlp.down, ops.Packed) == packs
    if has_linear():
        assert weights.embedding is weights.lm_head
    table = dict(found.tensors())["model.embed_tokens.weight"].bfloat16()
    ids = torch.tensor([0, 5, 31, 32, len(table) - 1])
    assert torch.equal(ops.embedding(weights.embedding, ids, found.config.hidden_size), table[ids])
