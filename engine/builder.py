"""Builds the parts of an engine: loads the weights, plans the KV cache, makes the model runner and the scheduler."""

import hashlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from dispec.engine.dtypes import DTYPES
from dispec.engine.execution.execution_plan import plan_for
from dispec.engine.execution.kv_cache_memory import (
    KVPlan,
    allocate_kv_cache,
    format_bytes,
    free_memory,
    kv_cache_bytes,
    kv_dtype,
    plan_kv_cache,
    return_freed_memory,
    weight_bytes,
)
from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.ranks import AllocateCache
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.draft_checkpoint import SharedDraft
from dispec.engine.loading.quantization import draft_packing, packing_for, weights_format, with_kernels
from dispec.engine.loading.quantization_config import refuse_second_quantization
from dispec.engine.machine.cache_directory import writable_cache
from dispec.engine.machine.compile_cache import choose_compile_cache
from dispec.engine.machine.torch_threads import set_threads
from dispec.engine.options import EngineOptions
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.speculation.draft_loop import DraftLoop
from dispec.engine.speculation.draft_model import Draft, DraftModelProposer, find_draft
from dispec.engine.speculation.ngram import NgramProposer
from dispec.engine.speculation.proposer import Proposer
from dispec.engine.speculation.speculator import Speculator
from dispec.engine.structured_output.grammar_compiler import GrammarCompiler
from dispec.engine.transfer.interface import TRANSPORTS, TransferOptions
from dispec.engine.transfer.transfer_engine import TransferEngine
from dispec.layers.config import ModelConfig, UnsupportedModelError
from dispec.layers.sharding import Sharding, check_can_shard
from dispec.layers.types import Weights
from dispec.layers.weight_specs import declare
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights, load_weights
from dispec.ops import Matrix
from dispec.ops.cpu.library import has_kernels, is_cached
from dispec.ops.cuda import library as cuda_library
from dispec.ops.paged_attention import TRITON_HEAD_DIMS

if TYPE_CHECKING:
    from dispec.engine.distributed.tensor_parallel import TensorParallel
    from dispec.engine.transfer.shared_memory import SharedMemory

log = logging.getLogger("dispec")


@dataclass
class EngineParts:
    """The parts of an engine.

    weights_format: in words, such as "bfloat16, dequantised from GGUF Q4_1 and Q8_0".
    ranks: the processes of the other ranks of a tensor-parallel model.
    transfer_engine: exchanges KV blocks with other engines, if `kv_transfer` is on.
    phase_seconds: of each phase of the start, by its name.
    """

    checkpoint: Checkpoint | None
    config: ModelConfig
    weights_format: str
    kv_plan: KVPlan
    ranks: "TensorParallel | None"
    runner: ModelRunner
    speculator: Speculator | None
    scheduler: Scheduler
    grammar_compiler: GrammarCompiler
    transfer_engine: TransferEngine | None
    phase_seconds: dict[str, float]


class EngineBuilder:
    """Builds the parts of one engine. Call `build` once, in the process's main thread."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._device = options.torch_device()
        self._dtype = DTYPES[options.dtype]
        self._phase_seconds: dict[str, float] = {}
        default_budget = max(8192 if self._device.type == "cuda" else 512, options.max_num_seqs)
        self._max_num_batched_tokens = options.max_num_batched_tokens or default_budget
        self._ranks: TensorParallel | None = None

    def build(self) -> EngineParts:
        """Return the parts.

        Raises ValueError for a wrong `DISPEC_CUDA_KERNELS`, and for options that the model, the device or its memory
        cannot fulfil, before loading weights where that is possible. The processes of other ranks are closed on any
        error.
        """
        options = self._options
        cuda_library.is_enabled()  # raises ValueError before the weights are loaded
        set_threads(options.num_threads())
        with self._phase("find"):
            if isinstance(options.model, ModelConfig):
                self._checkpoint, self._config = None, options.model
            else:
                self._checkpoint = find_checkpoint(options.model, without_weights=options.load_format == "dummy")
                self._config = self._checkpoint.config
                refuse_second_quantization(options.quantization, self._checkpoint.quantization)
            self._draft = find_draft(options, self._checkpoint, self._config)
            check_can_shard(self._config, options.tensor_parallel_size)
        if self._device.type == "cuda":
            choose_compile_cache()  # before the first kernel of ours is compiled
            torch.cuda.set_device(self._device)  # Triton launches on the current device
            capability = torch.cuda.get_device_capability(self._device)
            if options.kv_cache_dtype == "fp8" and capability < (8, 9):
                raise ValueError(
                    f"kv_cache_dtype is 'fp8', which needs CUDA compute capability 8.9, the device has"
                    f" {capability[0]}.{capability[1]}: use 'int8'"
                )
            if self._config.head_dim not in TRITON_HEAD_DIMS:
                raise UnsupportedModelError(
                    f"head_dim {self._config.head_dim} on CUDA: the kernels are made for {TRITON_HEAD_DIMS}"
                )
        if options.tensor_parallel_size > 1:
            from dispec.engine.distributed.tensor_parallel import TensorParallel  # imports torch.distributed

            self._ranks = TensorParallel(options, self._device)
        try:
            return self._build_parts()
        except BaseException:
            if self._ranks is not None:
                self._ranks.close()
            raise

    def _build_parts(self) -> EngineParts:
        options = self._options
        # With this rank's heads alone, if there are other ranks.
        self._local_config = Sharding(self._config, self._ranks.shard).local_config() if self._ranks else self._config
        if self._device.type == "cpu":
            # Nothing here needs the weights' size: a context that cannot fit is refused before minutes of loading.
            self._plan_kv_cache(free_memory(self._device, options.gpu_memory_utilization))
        with self._phase("load"):
            weights = self._load(self._checkpoint, self._config, packing_for(options, self._device))
            draft_weights = self._load_draft(weights) if self._draft is not None else None
            return_freed_memory()
        if has_kernels() and not is_cached():
            writable_cache()  # warns that they are built again at each start
        self._plan = plan_for(options, self._device, self._config.head_dim)
        activation_bytes = 0
        if self._device.type == "cuda":
            with self._phase("measure"):
                activation_bytes = self._measure_activations(weights)
        free = free_memory(self._device, options.gpu_memory_utilization) - activation_bytes
        kv_plan = self._plan_kv_cache(free)
        limit = self._config.max_position_embeddings
        if kv_plan.max_model_len < (options.max_model_len or limit):
            log.warning(
                "max_model_len is %d, the model's is %d: the KV cache holds no more", kv_plan.max_model_len, limit
            )
        shared_memory = self._allocate_shared_memory(kv_plan)
        runner = self._make_runner(self._local_config, weights, kv_plan, shared_memory=shared_memory)
        self._plan = runner.plan
        speculator = None
        if options.speculative_model is not None:
            proposer: Proposer = NgramProposer()
            if self._draft is not None:
                assert draft_weights is not None
                proposer = self._make_draft_model(self._draft, draft_weights, kv_plan, runner)
            speculator = Speculator(options.num_speculative_tokens, proposer)
        if self._plan.compile == "startup":
            self._compile(runner, speculator)
        parts = EngineParts(
            self._checkpoint,
            self._config,
            weights_format(weights, options, self._checkpoint),
            kv_plan,
            self._ranks,
            runner,
            speculator,
            self._make_scheduler(kv_plan),
            self._make_grammar_compiler(),
            self._make_transfer_engine(runner, shared_memory),
            self._phase_seconds,
        )
        self._log_start(parts, activation_bytes)
        return parts

    def _make_grammar_compiler(self) -> GrammarCompiler:
        path = None if self._checkpoint is None else self._checkpoint.directory / "tokenizer.json"
        known = str(path) if path is not None and path.is_file() else None
        eos_token_ids = self._checkpoint.eos_token_ids if self._checkpoint is not None else ()
        return GrammarCompiler(known, self._config.vocab_size, eos_token_ids)

    def _plan_kv_cache(self, free_bytes: int) -> KVPlan:
        draft = self._draft.config if self._draft is not None else None
        return plan_kv_cache(self._local_config, self._options, self._device, free_bytes, draft)

    def _load_draft(self, target: Weights) -> Weights:
        assert self._draft is not None
        packing = draft_packing(self._device, self._dtype)
        checkpoint, borrowed = self._draft.checkpoint, None
        if isinstance(checkpoint, SharedDraft):
            borrowed = checkpoint.borrowed(self._load_tables() if self._ranks is not None else target, packing)
        return self._load(checkpoint, self._draft.config, packing, borrowed, is_sharded=False)

    def _load_tables(self) -> Weights:
        """Return the target with its first layer alone and not sharded, for its embedding and head."""
        assert self._checkpoint is not None
        config = replace(self._config, num_layers=1)
        names = {source.name for spec in declare(config) for source in spec.sources}
        tensors = self._checkpoint.tensors(self._dtype, self._options.quantization)
        few = with_kernels(((name, one) for name, one in tensors if name in names), self._dtype, self._device)
        return load_weights(config, few, self._dtype, self._device, packing=packing_for(self._options, self._device))

    def _load(
        self,
        checkpoint: Checkpoint | SharedDraft | None,
        config: ModelConfig,
        packing: Packing,
        borrowed: Mapping[str, Matrix] | None = None,
        *,
        is_sharded: bool = True,
    ) -> Weights:
        shard = self._ranks.shard if self._ranks is not None and is_sharded else None
        if self._options.load_format == "dummy" or checkpoint is None:
            return dummy_weights(config, self._dtype, self._device, self._options.seed or 0, shard, packing)
        with tqdm(
            desc="loading weights", unit="param", unit_scale=True, disable=not self._options.show_progress, leave=False
        ) as bar:
            tensors = checkpoint.tensors(self._dtype, self._options.quantization)
            tensors = with_kernels(tensors, self._dtype, self._device)
            return load_weights(config, tensors, self._dtype, self._device, bar.update, borrowed, shard, packing)

    def _measure_activations(self, weights: Weights) -> int:
        """Return the bytes that the largest step takes beside weights and cache, by running it on a one-block cache."""
        options = self._options
        length = options.max_model_len or self._config.max_position_embeddings
        runner = self._make_runner(self._local_config, weights, KVPlan(2, options.block_size, 0, length, "probe"))
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        num_sampled = options.max_num_seqs * (1 + options.max_num_draft_tokens)
        runner.run_padding(self._max_num_batched_tokens, num_sampled)
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        del runner
        torch.cuda.empty_cache()
        return peak

    def _allocate_shared_memory(self, plan: KVPlan) -> "SharedMemory | None":
        """Return memory for the KV cache that other engines on this machine can read, if `kv_transfer` uses it."""
        if self._options.kv_transfer not in ("auto", "shm") or self._device.type != "cpu":
            return None
        from dispec.engine.transfer.shared_memory import allocate

        return allocate(kv_cache_bytes(self._config, plan, kv_dtype(self._options)))

    def _make_runner(
        self,
        config: ModelConfig,
        weights: Weights,
        plan: KVPlan,
        head_tokens: torch.Tensor | None = None,
        shared_memory: "SharedMemory | None" = None,
        *,
        is_draft: bool = False,
    ) -> ModelRunner:
        options = self._options
        ranks = None if is_draft else self._ranks  # the first rank alone runs a draft model
        if ranks is not None:
            ranks.send(AllocateCache(plan, self._max_num_batched_tokens))
        memory = shared_memory.tensor if shared_memory else None
        return ModelRunner(
            self._plan,
            config,
            weights,
            allocate_kv_cache(config, plan, kv_dtype(options), self._device, memory),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_num_draft_tokens=0 if is_draft else options.max_num_draft_tokens,
            # A draft model decodes in its loop. Its other steps are ragged on CUDA, which needs no further graphs.
            max_query_len=0 if is_draft and self._device.type == "cuda" else None,
            vocab_size=self._config.vocab_size,
            head_tokens=head_tokens,
            ranks=ranks,
        )

    def _make_draft_model(
        self, draft: Draft, weights: Weights, plan: KVPlan, target: ModelRunner
    ) -> DraftModelProposer:
        options = self._options
        head_tokens = None if draft.head_tokens is None else torch.tensor(draft.head_tokens, device=self._device)
        runner = self._make_runner(draft.config, weights, plan, head_tokens, is_draft=True)
        sizes = (options.max_num_seqs, options.num_speculative_tokens, plan.max_model_len)
        loop = DraftLoop(runner, target.previous_token_ids, *sizes)
        return DraftModelProposer(runner, loop, self._max_num_batched_tokens)

    def _make_scheduler(self, plan: KVPlan) -> Scheduler:
        options = self._options
        return Scheduler(
            BlockPool(plan.num_blocks, plan.block_size),
            options.max_num_seqs,
            self._max_num_batched_tokens,
            max_prefill_chunk=options.max_prefill_chunk or (2048 if self._device.type == "cuda" else None),
            max_lone_prefill_chunk=options.max_prefill_chunk or self._max_num_batched_tokens,
            priority_aging=options.priority_aging,
            enable_prefix_caching=options.enable_prefix_caching,
        )

    def _make_transfer_engine(self, runner: ModelRunner, shared_memory: "SharedMemory | None") -> TransferEngine | None:
        options = self._options
        if options.kv_transfer is None:
            return None
        transfer_engine = TransferEngine(
            TransferOptions(
                engine_id=uuid.uuid4().hex,
                host=options.kv_transfer_host,
                port=options.kv_transfer_port,
                secret=options.kv_transfer_secret,
                transports=TRANSPORTS if options.kv_transfer == "auto" else (options.kv_transfer,),
                lease_seconds=options.kv_transfer_lease,
            )
        )
        fingerprint = (
            f"{self._config} {options.dtype} {kv_dtype(options)} {options.quantization}"
            f" {options.quantization_group_size} {options.block_size} {options.seed}"
        )
        transfer_engine.register(runner.kv_cache, hashlib.sha256(fingerprint.encode()).hexdigest(), shared_memory)
        return transfer_engine

    def _compile(self, runner: ModelRunner, speculator: Speculator | None) -> None:
        pieces = compile_pieces(runner, speculator)
        with self._phase("compile"):
            for _ in tqdm(pieces, desc="compiling", unit="graph", disable=not self._options.show_progress, leave=False):
                pass

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phase_seconds[name] = time.perf_counter() - start

    def _log_start(self, parts: EngineParts, activation_bytes: int) -> None:
        """Log how steps run, where memory went and how long the start took."""
        plan = parts.kv_plan
        lines = [
            ("weights", format_bytes(weight_bytes(parts.runner.weights)), parts.weights_format),
            (
                "kv cache",
                format_bytes(plan.num_blocks * plan.block_bytes),
                f"{str(kv_dtype(self._options)).removeprefix('torch.')}, {plan.num_blocks - 1} blocks of"
                f" {plan.block_size} tokens = {plan.num_tokens} tokens; {plan.reason}",
            ),
        ]
        if activation_bytes:
            note = f"a step of {self._max_num_batched_tokens} tokens"
            lines.append(("activations", format_bytes(activation_bytes), note))
        device = str(self._device)
        if self._device.type == "cuda":
            lines.append(("free", format_bytes(free_memory(self._device, 1.0)), "left to others"))
        else:
            threads = torch.get_num_threads()
            device += f" with {threads} thread{'' if threads == 1 else 's'}"
        seconds = ", ".join(f"{name} {took:.1f} s" for name, took in self._phase_seconds.items())
        log.info("%s on %s, context %d; %s", self._config.architecture, device, plan.max_model_len, seconds)
        log.info("  %-12s %s", "steps", parts.runner.plan.describe())
        for name, size, note in lines:
            log.info("  %-12s %10s  %s", name, size, note)


def compile_pieces(runner: ModelRunner, speculator: Speculator | None) -> Iterator[None]:
    """Compile and record everything that a run can need, one piece at each `next`; the last one puts it to use."""
    yield from runner.compile_pieces()
    if speculator is not None and runner.is_compiled:
        yield from speculator.proposer.compile_pieces(runner.sampler.functions)
