"""A decode step's layer as one op gives the very bits of the ops that it stands for, for every family's flags."""

import functools

import pytest
import torch

import ops
from engine.checkpoint import find_checkpoint
from layers import model
from layers.weights import load_weights
from tests.checkpoints import FAMILIES, save_tiny
from tests.paged_model import PagedModel

PROMPTS = [list(range(3, 43)), list(range(60, 67)), list(range(20, 50))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("may_round", [False, True])
def test_bits_are_those_of_the_parts(tmp_path, monkeypatch, family, query_len, may_round):
    save_tiny(tmp_path, family, head_dim=32, intermediate_size=96)
    checkpoint = find_checkpoint(tmp_path)
    pack = functools.partial(ops.pack, may_round=may_round)
    weights = load_weights(checkpoint.config, checkpoint.tensors(), torch.bfloat16, torch.device("cpu"), pack=pack)
    runs = [PagedModel(weights, checkpoint.config, PROMPTS, block_size=16) for _ in range(2)]
    keys = runs[0].kv_cache[0].keys
    block = weights.blocks[0]
    matrices = (block.attention.qkv, block.attention.output, block.mlp.down)
    if not ops.has_layer_kernel(matrices, block.mlp.gate_up, keys):
        pytest.skip("this CPU has neither AVX512-BF16 nor AVX2")
    calls = []
    monkeypatch.setattr(model.ops, "decoder_layer", lambda *given: calls.append(1) or ops.layer.decoder_layer(*given))
    for run in runs:
        run.compute({0: 28, 1: 1, 2: 18})
    assert not calls  # a ragged step may hold long prompts
    for _ in range(2):
        counts = dict.fromkeys(range(3), query_len)
        whole = runs[0].compute(counts, query_len)
        with monkeypatch.context() as patch:
            patch.setattr(model.ops, "has_layer_kernel", lambda *_: False)
            parts = runs[1].compute(counts, query_len)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert len(calls) == 2 * checkpoint.config.num_layers
    for one, other in zip(runs[0].kv_cache, runs[1].kv_cache, strict=True):
        assert torch.equal(one.keys[1:].nan_to_num(7), other.keys[1:].nan_to_num(7))
        assert torch.equal(one.values[1:].nan_to_num(7), other.values[1:].nan_to_num(7))
