"""The engine: requests in, tokens out, one step at a time."""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from collections.abc import Sequence as Series
from contextlib import contextmanager

import torch
from tqdm import tqdm

from engine.block_pool import BlockPool
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.memory import KVPlan, allocate_kv_cache, format_bytes, free_memory, plan_kv_cache, weight_bytes
from engine.options import DTYPES, EngineOptions
from engine.runner import Runner, mark_static
from engine.scheduler import Scheduler, TokenOutput
from engine.sequence import SamplingParams, Sequence
from layers.config import ModelConfig, UnsupportedModelError
from layers.types import Weights
from layers.weights import dummy_weights, load_weights
from ops.paged_attention import TRITON_HEAD_DIMS

log = logging.getLogger("dispec")


class Engine:
    """Loads a model and serves sequences with it. Make it and step it in one thread, the process's main one."""

    def __init__(self, options: EngineOptions, show_progress: bool = False) -> None:
        self.options = options
        self.device = options.torch_device()
        self.phase_seconds: dict[str, float] = {}
        self._show_progress = show_progress
        self._ids = itertools.count()
        self.checkpoint: Checkpoint | None = None
        self.config: ModelConfig
        with self._phase("find"):
            if isinstance(options.model, ModelConfig):
                self.config = options.model
            else:
                self.checkpoint = find_checkpoint(options.model)
                self.config = self.checkpoint.config
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches on the current device
            if self.config.head_dim not in TRITON_HEAD_DIMS:
                raise UnsupportedModelError(
                    f"head_dim {self.config.head_dim} on CUDA: the kernels are made for {TRITON_HEAD_DIMS}"
                )
        before = free_memory(self.device, options.gpu_memory_utilization)
        # Nothing here needs the weights' size: a context that cannot fit is refused before minutes of loading.
        if self.device.type == "cpu":
            plan_kv_cache(self.config, options, self.device, before)
        with self._phase("load"):
            weights = self._load_weights()
        default_budget = max(8192 if self.device.type == "cuda" else 512, options.max_num_seqs)
        self.max_num_batched_tokens = options.max_num_batched_tokens or default_budget
        activations = self._activation_bytes(weights) if self.device.type == "cuda" else 0
        free = free_memory(self.device, options.gpu_memory_utilization) - activations
        self.kv_plan = plan_kv_cache(self.config, options, self.device, free)
        self.max_model_len = self.kv_plan.max_model_len
        limit = self.config.max_position_embeddings
        if self.max_model_len < (options.max_model_len or limit):
            log.warning("max_model_len is %d, the model's is %d: the KV cache holds no more", self.max_model_len, limit)
        self.runner = self._make_runner(weights, self.kv_plan)
        if not options.enforce_eager:
            with self._phase("compile"):
                self.runner.compile(show_progress)
        self.scheduler = Scheduler(
            BlockPool(self.kv_plan.num_blocks, self.kv_plan.block_size),
            options.max_num_seqs,
            self.max_num_batched_tokens,
        )
        self._log_ledger(weights, activations)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.checkpoint.eos_token_ids if self.checkpoint else ()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, prompt: Series[int], params: SamplingParams) -> Sequence:
        """Queue a prompt of token ids. Raises ValueError, and changes nothing, if it cannot be served."""
        if len(prompt) == 0:
            raise ValueError("prompt is empty: it must have at least 1 token")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(prompt)} tokens, must be below max_model_len ({self.max_model_len}) to leave room"
                " for an answer"
            )
        for name, tokens in (("prompt", prompt), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < self.config.vocab_size:
                    raise ValueError(f"{name} holds token id {token}, must be in 0 … {self.config.vocab_size - 1}")
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops.update(self.eos_token_ids)
        sequence = Sequence(
            id=next(self._ids),
            token_ids=list(prompt),
            params=params,
            seed=int.from_bytes(os.urandom(8), signed=True) if params.seed is None else params.seed,
            stop_token_ids=frozenset(stops),
            max_len=min(self.max_model_len, len(prompt) + params.max_tokens),
            arrival_time=time.perf_counter(),
        )
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is, and free what it holds."""
        self.scheduler.abort(sequence)

    def step(self) -> list[TokenOutput]:
        """Run the model once over whatever is due; the new tokens, at most one a sequence."""
        step = self.scheduler.schedule()
        sampled = self.runner.run(step)
        return self.scheduler.commit(step, sampled)

    def _load_weights(self) -> Weights:
        dtype = DTYPES[self.options.dtype]
        if self.options.load_format == "dummy" or self.checkpoint is None:
            return dummy_weights(self.config, dtype, self.device, self.options.seed)
        with tqdm(
            desc="loading weights", unit="param", unit_scale=True, disable=not self._show_progress, leave=False
        ) as bar:
            return load_weights(self.config, self.checkpoint.tensors(), dtype, self.device, bar.update)

    def _make_runner(self, weights: Weights, plan: KVPlan) -> Runner:
        kv_cache = allocate_kv_cache(self.config, plan, DTYPES[self.options.dtype], self.device)
        if self.device.type == "cuda":
            mark_static(weights, kv_cache)
        return Runner(
            self.config,
            weights,
            kv_cache,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
        )

    def _activation_bytes(self, weights: Weights) -> int:
        """What the largest step takes beside weights and cache, found by running it on a cache of one block."""
        length = self.options.max_model_len or self.config.max_position_embeddings
        runner = self._make_runner(weights, KVPlan(2, self.options.block_size, 0, length, "probe"))
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        runner.run_padding(self.max_num_batched_tokens, self.options.max_num_seqs)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del runner
        torch.cuda.empty_cache()
        return peak

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phase_seconds[name] = time.perf_counter() - start

    def _log_ledger(self, weights: Weights, activations: int) -> None:
        """Say where memory went and how long the start took."""
        plan = self.kv_plan
        lines = [
            ("weights", format_bytes(weight_bytes(weights)), self.options.dtype),
            (
                "kv cache",
                format_bytes(plan.num_blocks * plan.block_bytes),
                f"{plan.num_blocks - 1} blocks of {plan.block_size} tokens = {plan.num_tokens} tokens; {plan.reason}",
            ),
        ]
        if activations:
            lines.append(("activations", format_bytes(activations), f"a step of {self.max_num_batched_tokens} tokens"))
        if self.device.type == "cuda":
            lines.append(("free", format_bytes(free_memory(self.device, 1.0)), "left to others"))
        seconds = ", ".join(f"{name} {took:.1f} s" for name, took in self.phase_seconds.items())
        log.info("%s on %s, context %d; %s", self.config.architecture, self.device, self.max_model_len, seconds)
        for name, size, note in lines:
            log.info("  %-12s %10s  %s", name, size, note)
