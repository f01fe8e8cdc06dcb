"""The steps as the compiler sees them for CUDA, traced with fake tensors: one graph of each for all sizes.

A size of 1 is not symbolic to the compiler, and equal sizes are one to it: those of a first trace are at least 2, and
differ.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from dispec.layers.config import ModelConfig, Shard
from dispec.layers.sharding import Sharding
from dispec.layers.speculation import DraftState, draft_step
from dispec.layers.steps import PreviousTokens, Vocabulary, decode_step, prefill_step
from dispec.layers.types import Batch, KVCache, Sampling, SamplingFilters, Weights
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights
from dispec.ops import Quantization

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=500,
    hidden_size=96,
    intermediate_size=192,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
    qk_norm=True,
)
VOCABULARY = Vocabulary(CONFIG.vocab_size)
BLOCK_SIZE, NUM_BLOCKS, BLOCKS_EACH, PREVIOUS = 16, 41, 13, 29


class Graphs:
    """A compiler that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            self.found.append(graph)
            return graph.forward

        return torch.compile(step, backend=keep, fullgraph=True)

    def calls(self) -> Counter[Any]:
        """How often the one graph calls each function."""
        (graph,) = self.found
        return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def getitem(tensor: Tensor, index: Any) -> Tensor:
    """Index a tensor on a device that this build of torch has no device guard for, as its own indexing wants."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        tensor = tensor.unsqueeze(dim) if part is None else torch.ops.aten.slice(tensor, dim, part.start, part.stop)
        dim += 1
    return tensor


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    if torch.version.cuda is None:
        monkeypatch.setattr(FakeTensor, "__getitem__", getitem)
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)  # the compiler cannot trace through the checks
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        yield Graphs()
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="cuda")


def model(
    config: ModelConfig, dtype: torch.dtype, shard: Shard | None = None, quantization: Quantization | None = None
) -> tuple[Weights, KVCache]:
    def on_gpu(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    packing = Packing(quantization, keeps_plain=quantization is None)
    weights = dummy_weights(config, dtype, torch.device("cpu"), shard=shard, packing=packing)
    local = config if shard is None else Sharding(config, shard).local_config()
    shape = (local.num_layers, NUM_BLOCKS, local.num_kv_heads)
    keys, values = (*shape, local.head_dim, BLOCK_SIZE), (*shape, BLOCK_SIZE, local.head_dim)
    cache = KVCache(*(torch.empty(shape, dtype=dtype, device="cuda") for shape in (keys, values)))
    return tree_map_only(Tensor, on_gpu, weights), cache


def batch(tokens: int, sequences: int, rows: int) -> Batch:
    made = Batch(
        token_ids=integers(tokens),
        positions=integers(tokens),
        slot_mapping=integers(tokens),
        block_tables=integers(sequences, BLOCKS_EACH),
        query_start=integers(sequences + 1),
        context_lens=integers(sequences),
        logits_indices=integers(rows),
    )
    return symbolic(made)


def previous(tokens: int) -> PreviousTokens:
    return PreviousTokens(symbolic(integers(tokens)), integers(PREVIOUS).long())


def symbolic(tree: Any) -> Any:
    """Mark the first dimension of each tensor: tokens, sequences or rows."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_dynamic(tensor, 0)
    return tree


def assert_has_cuda_kernels(calls: Counter[Any]) -> set[str]:
    """Our ops in a graph, each of which CUDA has a kernel for."""
    names = {str(target).removesuffix(".default") for target in calls if str(target).startswith("dispec.")}
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name.replace(".", "::"), "CUDA"), name
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_and_verification_are_one_graph(graphs: Graphs, dtype: torch.dtype) -> None:
    weights, cache = model(CONFIG, dtype)
    step = graphs.compiled(lambda *inputs: decode_step(weights, CONFIG, VOCABULARY, inputs[0], cache, inputs[1]))
    for sequences, query_len, rows in ((5, 3, 7), (2, 1, 2), (32, 1, 19), (2, 3, 6), (16, 6, 9)):
        tokens = sequences * query_len
        logits, likeliest = step(batch(tokens, sequences, rows), previous(tokens))
        assert logits.shape == (rows, CONFIG.vocab_size)
        assert likeliest.shape == (rows,)
    calls = graphs.calls()
    names = assert_has_cuda_kernels(calls)
    each = {name: sum(calls[target] for target in calls if str(target) == name) for name in names}
    if dtype is torch.bfloat16:  # a layer is five ops, the head one
        layer = {"qkv_rope_write": 1, "paged_attention": 1, "linear_residual": 2, "fused_linear": 1}
        expected = Counter({f"dispec.{name}": count * CONFIG.num_layers for name, count in layer.items()})
        assert each == expected + Counter({"dispec.fused_linear": 1, "dispec.rope_cos_sin": 1, "dispec.argmax": 1})
    else:
        assert each == {
            "dispec.rope_cos_sin": 1,
            "dispec.write_kv": CONFIG.num_layers,
            "dispec.paged_attention": CONFIG.num_layers,
            "dispec.argmax": 1,
        }


def test_steps_with_fp8_weights_are_one_graph(graphs: Graphs) -> None:
    weights, cache = model(CONFIG, torch.bfloat16, quantization=Quantization("fp8"))
    step = graphs.compiled(lambda *inputs: decode_step(weights, CONFIG, VOCABULARY, inputs[0], cache, inputs[1]))
    for sequences, query_len, rows in ((5, 3, 7), (2, 1, 2), (32, 1, 19)):
        tokens = sequences * query_len
        logits, _ = step(batch(tokens, sequences, rows), previous(tokens))
        assert logits.shape == (rows, CONFIG.vocab_size)
    calls = graphs.calls()
    names = assert_has_cuda_kernels(calls)
    each = {name: sum(calls[target] for target in calls if str(target) == name) for name in names}
    assert each == {
        "dispec.rope_cos_sin": 1,
        "dispec.rope_write": CONFIG.num_layers,
        "dispec.paged_attention": CONFIG.num_layers,
        "dispec.quantized_linear": 4 * CONFIG.num_layers + 1,
        "dispec.argmax": 1,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_of_all_sizes_is_one_graph(graphs: Graphs, dtype: torch.dtype) -> None:
    weights, cache = model(CONFIG, dtype)
    step = graphs.compiled(lambda *inputs: prefill_step(weights, CONFIG, VOCABULARY, inputs[0], cache, inputs[1]))
    for tokens, sequences, rows in ((64, 5, 7), (128, 2, 2), (64, 32, 32), (300, 3, 300)):
        states, logits, likeliest = step(batch(tokens, sequences, rows), previous(tokens))
        assert states.shape == (tokens, CONFIG.hidden_size)
        assert logits.shape == (rows, CONFIG.vocab_size)
        assert likeliest.shape == (rows,)
    assert_has_cuda_kernels(graphs.calls())


@pytest.mark.parametrize(
    ("dtype", "knows_some", "draws"),
    [
        (torch.bfloat16, False, "greedy"),
        (torch.bfloat16, True, "sampled"),
        (torch.bfloat16, True, "filtered"),
        (torch.float32, True, "greedy"),
        (torch.float32, False, "filtered"),
    ],
)
def test_draft_steps_are_one_graph(graphs: Graphs, dtype: torch.dtype, knows_some: bool, draws: str) -> None:
    weights, cache = model(CONFIG, dtype)
    vocabulary = VOCABULARY
    if knows_some:
        weights = weights._replace(lm_head=weights.lm_head[:99])
        vocabulary = Vocabulary(CONFIG.vocab_size, integers(99).long())
    step = graphs.compiled(lambda state: draft_step(weights, CONFIG, vocabulary, state, cache))
    for sequences in (5, 2, 16):
        ones = torch.empty(sequences, device="cuda")
        sampling = Sampling(ones, integers(sequences).long(), integers(sequences).long())
        filters = SamplingFilters(integers(sequences), ones, ones)
        state = DraftState(
            batch(2 * sequences, sequences, sequences),
            *symbolic(
                (
                    integers(sequences),
                    None if draws == "greedy" else sampling,
                    filters if draws == "filtered" else None,
                )
            ),
        )
        for _ in range(3):
            token_ids, state = step(state)
            assert token_ids.shape == state.batch.token_ids.shape == (sequences,)
    names = assert_has_cuda_kernels(graphs.calls())
    assert ("dispec.token_threshold" in names) == (draws == "filtered")


@pytest.mark.parametrize("is_uniform", [True, False])
def test_what_ranks_say_to_one_another_is_in_the_graph(graphs: Graphs, is_uniform: bool) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        shard = Shard(1, 3, dist.group.WORLD.group_name)
        whole = replace(CONFIG, num_heads=9, num_kv_heads=3, output_bias=True)
        local = Sharding(whole, shard).local_config()
        weights, cache = model(whole, torch.bfloat16, shard)
        run = decode_step if is_uniform else prefill_step
        step = graphs.compiled(lambda *inputs: run(weights, local, VOCABULARY, inputs[0], cache, inputs[1]))
        for sequences, rows in ((5, 7), (16, 32)):
            step(batch(3 * sequences, sequences, rows), previous(3 * sequences))
    finally:
        dist.destroy_process_group()
    found = {str(target).split(".")[1]: count for target, count in graphs.calls().items() if "c10d" in str(target)}
    sums = 1 + 2 * whole.num_layers
    assert found == {"all_reduce": sums, "all_gather_into_tensor": 1, "broadcast": 1, "wait_tensor": sums + 2}
