"""The engine: requests in, tokens out, one step at a time."""

import functools
import hashlib
import itertools
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Series
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from dispec.engine.dtypes import DTYPES
from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.engine.execution.execution_plan import plan_for
from dispec.engine.execution.kv_cache_memory import (
    KVPlan,
    allocate_kv_cache,
    format_bytes,
    free_memory,
    kv_cache_bytes,
    plan_kv_cache,
    return_freed_memory,
    weight_bytes,
)
from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.pending_step import PendingStep
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.draft_checkpoint import SharedDraft
from dispec.engine.machine.cache_directory import writable_cache
from dispec.engine.machine.compile_cache import choose_compile_cache
from dispec.engine.machine.torch_threads import set_threads
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.logits_processors import LogitsProcessors, check_something_remains
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import SchedulerOutput, TokenOutput
from dispec.engine.scheduling.sequence import FinishReason, Sequence
from dispec.engine.scheduling.step_record import Kind, StepRecord
from dispec.engine.speculation.draft_loop import DraftLoop
from dispec.engine.speculation.draft_model import Draft, DraftModel, find_draft
from dispec.engine.speculation.speculator import Speculator
from dispec.engine.transfer.interface import RemoteBlocks, TransferOptions
from dispec.engine.transfer.kv_connector import KVConnector
from dispec.layers.config import ModelConfig, Shard, UnsupportedModelError
from dispec.layers.sharding import Sharding, check_can_shard
from dispec.layers.types import Weights
from dispec.layers.weights import Pack, dummy_weights, load_weights
from dispec.ops import Matrix, pack
from dispec.ops.cpu.library import has_kernels, is_cached
from dispec.ops.paged_attention import TRITON_HEAD_DIMS

if TYPE_CHECKING:
    from dispec.engine.distributed.tensor_parallel import TensorParallel
    from dispec.engine.transfer.shared_memory import SharedMemory
    from dispec.engine.transfer.transfers import Transfers

log = logging.getLogger("dispec")

_HELD_SECONDS = 0.05  # to wait, when every block is in another engine's hands, before looking again


class _InFlight(NamedTuple):
    """A step that was launched and not yet committed, and what its record will say."""

    step: SchedulerOutput
    pending: PendingStep
    record: StepRecord


class Engine:
    """Loads a model and serves sequences with it. Make it and step it in one thread, the process's main one.

    started: when the last call of `step` started requests for the first time, by request id.
    failed: sequences that the last call of `step` ended with an error.
    records: of the last thousand steps. compiled_seconds: from the start until compiled steps took over, if they did
    so while the engine was already answering.
    """

    def __init__(self, options: EngineOptions, show_progress: bool = False) -> None:
        self.options = options
        self.device = options.torch_device()
        set_threads(options.num_threads())
        self._started = time.perf_counter()
        self.phase_seconds: dict[str, float] = {}
        self._show_progress = show_progress
        self._ids = itertools.count()
        self._in_flight: deque[_InFlight] = deque()
        self._outputs: list[TokenOutput] = []  # of the call of `step` under way
        self.started: dict[str, float] = {}
        self.failed: list[Sequence] = []
        self.records: deque[StepRecord] = deque(maxlen=1000)
        self.checkpoint: Checkpoint | None = None
        self.config: ModelConfig
        with self._phase("find"):
            if isinstance(options.model, ModelConfig):
                self.config = options.model
            else:
                self.checkpoint = find_checkpoint(options.model, without_weights=options.load_format == "dummy")
                self.config = self.checkpoint.config
            draft = find_draft(options, self.checkpoint, self.config)
            check_can_shard(self.config, options.tensor_parallel_size)
        if self.device.type == "cuda":
            choose_compile_cache()  # before the first kernel of ours is compiled
            torch.cuda.set_device(self.device)  # Triton launches on the current device
            if self.config.head_dim not in TRITON_HEAD_DIMS:
                raise UnsupportedModelError(
                    f"head_dim {self.config.head_dim} on CUDA: the kernels are made for {TRITON_HEAD_DIMS}"
                )
        self._ranks = self._start_ranks()
        # As this process runs it: with its own heads alone, if there are other ranks.
        self._own_config = Sharding(self.config, self._ranks.shard).local_config() if self._ranks else self.config
        try:
            self._set_up(draft)
        except BaseException:  # the other ranks must not outlive what was refused
            if self._ranks is not None:
                self._ranks.close()
            raise

    def _set_up(self, draft: Draft | None) -> None:
        """Load the weights, plan the KV cache, and make what runs steps."""
        options = self.options
        before = free_memory(self.device, options.gpu_memory_utilization)
        # Nothing here needs the weights' size: a context that cannot fit is refused before minutes of loading.
        if self.device.type == "cpu":
            plan_kv_cache(self._own_config, options, self.device, before, draft.config if draft else None)
        with self._phase("load"):
            shard = self._ranks.shard if self._ranks else None
            weights = self._load_weights(self.checkpoint, self.config, shard=shard)
            draft_weights = None
            if draft is not None:
                # Rounding makes no answer another one: at worst a guess falls.
                rounded = functools.partial(pack, allow_int8=True)
                shared = draft.checkpoint if isinstance(draft.checkpoint, SharedDraft) else None
                borrowed = shared.borrowed(weights, rounded) if shared is not None else None
                draft_weights = self._load_weights(draft.checkpoint, draft.config, borrowed, pack=rounded)
            return_freed_memory()
        if has_kernels() and not is_cached():
            writable_cache()  # warns that they are built again at each start
        self.plan = plan_for(options, self.device, self.config.head_dim)
        default_budget = max(8192 if self.device.type == "cuda" else 512, options.max_num_seqs)
        self.max_num_batched_tokens = options.max_num_batched_tokens or default_budget
        activations = 0
        if self.device.type == "cuda":
            with self._phase("measure"):
                activations = self._activation_bytes(weights)
        free = free_memory(self.device, options.gpu_memory_utilization) - activations
        self.kv_plan = plan_kv_cache(self._own_config, options, self.device, free, draft.config if draft else None)
        self.max_model_len = self.kv_plan.max_model_len
        limit = self.config.max_position_embeddings
        if self.max_model_len < (options.max_model_len or limit):
            log.warning("max_model_len is %d, the model's is %d: the KV cache holds no more", self.max_model_len, limit)
        self._shared = self._allocate_shared()
        self.runner = self._make_runner(self._own_config, weights, self.kv_plan, shared=self._shared)
        self.plan = self.runner.plan
        self.speculator: Speculator | None = None
        if options.speculative_model is not None:
            draft_model = None
            if draft is not None:
                assert draft_weights is not None
                draft_model = self._make_draft_model(draft, draft_weights)
            self.speculator = Speculator(options.num_speculative_tokens, draft_model)
        self.compiled_seconds: float | None = None
        self._compiling: Iterator[None] | None = None
        if self.plan.compile == "background":
            self._compiling = self._compile_pieces()
        elif self.plan.compile == "startup":
            with self._phase("compile"):
                for _ in tqdm(
                    self._compile_pieces(), desc="compiling", unit="graph", disable=not self._show_progress, leave=False
                ):
                    pass
        self.scheduler = Scheduler(
            BlockPool(self.kv_plan.num_blocks, self.kv_plan.block_size),
            options.max_num_seqs,
            self.max_num_batched_tokens,
            max_prefill_chunk=options.max_prefill_chunk or (2048 if self.device.type == "cuda" else None),
            priority_aging=options.priority_aging,
            enable_prefix_caching=options.enable_prefix_caching,
        )
        self._counted: dict[str, int] = {}  # of the handover's totals, in the records so far
        self._transfers = self._make_transfers()
        self.kv_connector = KVConnector(self.scheduler, self._transfers)
        self._log_ledger(weights, activations)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.checkpoint.eos_token_ids if self.checkpoint else ()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or self.kv_connector.has_outputs

    def add(
        self,
        prompt: Series[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        slack: float = 0.0,
        publish_as: str | None = None,
        pull: RemoteBlocks | None = None,
        is_resumed: bool = False,
    ) -> Sequence:
        """Queue a prompt of token ids. Raises ValueError, and changes nothing, if it cannot be served.

        request_id: by which outputs name the request; None makes one.
        priority: lower goes first. cache_salt: shares cached prefixes only with prompts of the same salt.
        slack: seconds that it can wait; who has least left goes first.
        publish_as: compute the prompt and one token of each choice for another engine, which asks by this id.
        pull: where the prompt's keys and values come from. is_resumed: `resume` will tell of tokens that there are
        already. With either it waits for them. They need `kv_transfer`.

        Returns the first of the request's `choices`; where it asked for several, each is a sequence of its own.
        """
        self._check(prompt, params, priority)
        if (publish_as is not None or pull is not None) and self.kv_connector.transfers is None:
            raise InvalidField(
                "kv_transfer_params",
                "kv_transfer is off: this engine neither gives its KV cache to others nor takes theirs",
            )
        if publish_as is not None:
            params = replace(params, max_tokens=1, min_tokens=min(1, params.min_tokens))
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops.update(self.eos_token_ids)
        stop_token_ids = frozenset(stops)
        check_something_remains(params, stop_token_ids, self.config.vocab_size)
        seed = int.from_bytes(os.urandom(8), signed=True) if params.seed is None else params.seed
        arrival_time = time.perf_counter()
        choices = []
        for index in range(params.n):
            own = replace(params, prompt_logprobs=None) if index else params
            edits = LogitsProcessors(own, prompt, self.config.vocab_size, stop_token_ids)
            number = next(self._ids)
            request_id = request_id or f"request-{number}"
            choices.append(
                Sequence(
                    id=number,
                    request_id=request_id,
                    index=index,
                    token_ids=list(prompt),
                    params=own,
                    seed=(seed + index + 2**63) % 2**64 - 2**63,
                    stop_token_ids=stop_token_ids,
                    max_len=min(self.max_model_len, len(prompt) + params.max_tokens),
                    arrival_time=arrival_time,
                    priority=priority,
                    cache_salt=cache_salt,
                    slack=slack,
                    logits_processors=edits if edits.edits or edits.masks else None,
                )
            )
        for choice in choices:
            choice.choices = tuple(choices)
        if pull is not None or is_resumed:
            self.kv_connector.expect(tuple(choices), pull, awaits_outputs=is_resumed)
            self.kv_connector.advance()
            return choices[0]
        first, *first.forks = choices
        self.scheduler.add(first)
        if publish_as is not None:
            self.kv_connector.send(tuple(choices), publish_as)
        return first

    def resume(self, first: Sequence, outputs: list[list[int] | None]) -> None:
        """Tell what each choice of a request that `is_resumed` has generated so far; None ends a choice."""
        self.kv_connector.resume(first, outputs)
        self.kv_connector.advance()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is, and free what it holds. The request's other choices go on."""
        self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, for a reason that only the caller knows, such as a stop string in its text."""
        self.scheduler.finish(sequence, reason)
        self.kv_connector.forget_unwanted()
        self.kv_connector.publish()

    def step(self) -> list[TokenOutput]:
        """Run the model once over whatever is due; the new tokens, at most one a sequence.

        Where steps overlap, a step is launched before the one before it is waited for, whose tokens are returned; the
        last one's come from a call that finds nothing more to launch. Without work it returns at once.
        """
        self._outputs = []
        self.started, self.failed = {}, []
        try:
            return self._step()
        except Exception as error:  # whatever it is, it shall cost only those who cause it
            log.exception("a step failed; its sequences run one by one to find whose fault it is")
            return self._isolate(error)

    @property
    def has_idle_work(self) -> bool:
        """Whether `work_while_idle` has something to do at once."""
        return self._compiling is not None

    @property
    def wake_ups(self) -> list[int]:
        """File descriptors that become readable when `work_while_idle` gets something to do."""
        fd = self.kv_connector.fileno()
        return ([fd] if fd is not None else []) + (self._ranks.wake_ups if self._ranks is not None else [])

    def work_while_idle(self) -> None:
        """Do a part of what can wait: compile a graph, take what another process has sent.

        Raises TensorParallelError if another rank has ended.
        """
        if self._ranks is not None:
            self._ranks.check()
        self.kv_connector.advance()
        if self._compiling is not None and next(self._compiling, self) is self:
            self._compiling = None

    def close(self) -> None:
        """Let go of other engines, which will not get what they were reading from this one, and end all processes that
        this one started."""
        self._compiling = None
        self.kv_connector.close()
        if self._ranks is not None:
            self._ranks.close()

    def _compile_pieces(self) -> Iterator[None]:
        """Compile and record all that a run can need, a piece at each `next`; the last one has steps run it."""
        yield from self.runner.compile_pieces()
        if self.speculator is not None and self.speculator.draft_model is not None and self.runner.is_compiled:
            yield from self.speculator.draft_model.compile_pieces(self.runner.sampler.functions)
        if self.plan.compile == "background" and self.runner.is_compiled:
            self.compiled_seconds = time.perf_counter() - self._started
            log.info("compiled steps from here on, %.1f s after the start", self.compiled_seconds)

    def _step(self) -> list[TokenOutput]:
        started = time.perf_counter()
        self.kv_connector.advance()
        outputs = self._outputs
        if self.speculator is not None:
            if self._in_flight and self.speculator.needs_result(self.scheduler.running):
                outputs += self._commit(self._in_flight.popleft())
            self.speculator.plan(self.scheduler.running)
        step = self.scheduler.schedule()
        schedule_end = time.perf_counter()
        draft = self.speculator.propose(step) if self.speculator is not None else 0.0
        if step.scheduled_sequences:
            for scheduled in step.scheduled_sequences:
                if scheduled.sequence.scheduled_time is None:
                    for choice in scheduled.sequence.choices:
                        choice.scheduled_time = started
                    self.started[scheduled.sequence.request_id] = started
            pending = self.runner.launch(step, self.speculator.drafts if self.speculator is not None else None)
            launch = time.perf_counter() - schedule_end - draft
            record = self._record(step, started, schedule_end - started, draft, launch)
            self._in_flight.append(_InFlight(step, pending, record))
        outputs += self.kv_connector.take_outputs()
        while len(self._in_flight) > (self._overlaps(step) if step.scheduled_sequences else 0):
            outputs += self._commit(self._in_flight.popleft())
        if not step.scheduled_sequences and not outputs and self.scheduler.has_work:
            if self.scheduler.holds_remote_blocks:
                self.kv_connector.wait(_HELD_SECONDS)
                return outputs
            raise RuntimeError("the scheduler has work and schedules none of it: a bug, please report it")
        return outputs

    def _overlaps(self, step: SchedulerOutput) -> bool:
        """Whether the step may stay under way while the next one is prepared. How many tokens one with draft tokens
        gives decides where the next one begins."""
        return self.plan.overlaps and not any(scheduled.num_drafts for scheduled in step.scheduled_sequences)

    def _isolate(self, error: Exception) -> list[TokenOutput]:
        """After a failed step: run each of its sequences alone for one token, and end those that fail again.

        Raises the error if the engine fails without any of them, or for all of several: then it is no request's fault.
        """
        self._in_flight.clear()
        suspects = self.scheduler.reset()
        known = self._outputs  # what was committed before the failure stands
        outputs: list[TokenOutput] = []
        guilty = []
        for sequence in suspects:
            others = self.scheduler.isolate(sequence)
            try:
                num_output_tokens = sequence.num_output_tokens
                while self.scheduler.has_work and sequence.num_output_tokens == num_output_tokens:
                    step = self.scheduler.schedule()
                    outputs += self.scheduler.commit(step, self.runner.launch(step).wait())
                    self.kv_connector.publish()
            except Exception as own:
                sequence.error = f"{type(own).__name__}: {own}"
                guilty.append(sequence)
            self.scheduler.reset()
            self.scheduler.requeue(others)
        if not suspects or len(guilty) == len(suspects) > 1:
            raise error
        self.runner.run_padding(2, 1)  # raises if the device itself is lost
        for sequence in guilty:
            self.finish(sequence, "error")
        self.failed = guilty
        return known + outputs

    def _commit(self, flight: _InFlight) -> list[TokenOutput]:
        waiting = time.perf_counter()
        result = flight.pending.wait()
        waited = time.perf_counter()
        outputs = self.scheduler.commit(flight.step, result)
        self.kv_connector.publish()
        before, self._counted = self._counted, vars(self.kv_connector.totals).copy()
        handed_over: dict[str, Any] = {name: total - before.get(name, 0) for name, total in self._counted.items()}
        finished = sum(output.finish_reason is not None for output in outputs)
        record = flight.record._replace(
            wait=waited - waiting,
            num_finished=finished,
            **handed_over,
        )
        if self.speculator is not None:
            guessing = flight.pending.draft_seconds
            verifying = max(0.0, record.schedule + record.launch + record.wait - guessing)
            stood = self.speculator.observe(flight.step, result, verifying, guessing)
            record = record._replace(num_accepted_per_position=stood)
            if guessing:
                # The device guessed while the host launched and waited.
                record = record._replace(wait=max(0.0, record.wait - guessing), draft=record.draft + guessing)
        self.records.append(record._replace(commit=time.perf_counter() - waited))
        return outputs

    def _record(
        self, step: SchedulerOutput, started: float, schedule: float, draft: float, launch: float
    ) -> StepRecord:
        prompt_tokens = sum(
            scheduled.num_tokens
            for scheduled in step.scheduled_sequences
            if scheduled.num_tokens > 1 + scheduled.num_drafts or scheduled.start < scheduled.sequence.num_prompt_tokens
        )
        kind: Kind = "decode" if not prompt_tokens else "prefill" if prompt_tokens == step.num_tokens else "mixed"
        return StepRecord(
            kind=kind,
            num_sequences=len(step.scheduled_sequences),
            num_tokens=step.num_tokens,
            num_prompt_tokens=prompt_tokens,
            num_cached_tokens=step.num_cached_tokens,
            num_preempted=step.num_preempted,
            num_admitted=step.num_admitted,
            num_finished=0,
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_used_blocks=self.scheduler.pool.num_usable - self.scheduler.pool.num_free,
            started=started,
            schedule=schedule,
            launch=launch,
            wait=0.0,
            commit=0.0,
            draft=draft,
            num_drafts=sum(scheduled.num_drafts > 0 for scheduled in step.scheduled_sequences),
            num_draft_tokens=sum(scheduled.num_drafts for scheduled in step.scheduled_sequences),
            num_planned_draft_tokens=self.speculator.num_planned if self.speculator is not None else 0,
        )

    def _check(self, prompt: Series[int], params: SamplingParams, priority: int) -> None:
        if len(prompt) == 0:
            raise InvalidField("prompt", "prompt is empty: it must have at least 1 token")
        if len(prompt) >= self.max_model_len:
            raise ContextOverflow("prompt", f"prompt has {len(prompt)} tokens", self.max_model_len)
        for name, tokens in {"prompt": prompt, **params.token_fields()}.items():
            for token in tokens:
                if not 0 <= token < self.config.vocab_size:
                    last = self.config.vocab_size - 1
                    raise InvalidField(name, f"{name} holds token id {token}, must be in 0 … {last}")
        if params.stop or params.bad_words:
            name = "stop" if params.stop else "bad_words"
            raise InvalidField(name, f"{name} is a text, which the engine does not see: use LLM, or token ids")
        if not -(2**31) <= priority < 2**31:
            raise InvalidField("priority", f"priority is {priority}, must fit in 32 bits")

    def _load_weights(
        self,
        checkpoint: Checkpoint | SharedDraft | None,
        config: ModelConfig,
        borrowed: Mapping[str, Matrix] | None = None,
        shard: Shard | None = None,
        pack: Pack = pack,
    ) -> Weights:
        dtype = DTYPES[self.options.dtype]
        if self.options.load_format == "dummy" or checkpoint is None:
            return dummy_weights(config, dtype, self.device, self.options.seed, shard, pack)
        with tqdm(
            desc="loading weights", unit="param", unit_scale=True, disable=not self._show_progress, leave=False
        ) as bar:
            tensors = checkpoint.tensors(dtype)
            return load_weights(config, tensors, dtype, self.device, bar.update, borrowed, shard, pack)

    def _make_runner(
        self,
        config: ModelConfig,
        weights: Weights,
        plan: KVPlan,
        head_tokens: torch.Tensor | None = None,
        shared: "SharedMemory | None" = None,
        *,
        verifies: bool = True,
    ) -> ModelRunner:
        if self._ranks is not None:
            self._ranks.allocate_cache(plan, self.max_num_batched_tokens)
        kv_cache = allocate_kv_cache(
            config, plan, DTYPES[self.options.dtype], self.device, shared.tensor if shared else None
        )
        return ModelRunner(
            self.plan,
            config,
            weights,
            kv_cache,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_num_drafts=self.options.max_num_drafts if verifies else 0,
            # A draft model decodes in its loop; what it computes besides is ragged on CUDA, which takes no other graph.
            max_query_len=None if verifies or self.device.type == "cpu" else 0,
            vocab_size=self.config.vocab_size,
            head_tokens=head_tokens,
            ranks=self._ranks,
        )

    def _make_draft_model(self, draft: Draft, weights: Weights) -> DraftModel:
        options = self.options
        head_tokens = None if draft.head_tokens is None else torch.tensor(draft.head_tokens, device=self.device)
        runner = self._make_runner(draft.config, weights, self.kv_plan, head_tokens, verifies=False)
        sizes = (options.max_num_seqs, options.num_speculative_tokens, self.kv_plan.max_model_len)
        loop = DraftLoop(runner, self.runner.sampled, *sizes)
        return DraftModel(runner, loop, self.max_num_batched_tokens)

    def _make_transfers(self) -> "Transfers | None":
        options = self.options
        if options.kv_transfer is None:
            return None
        from dispec.engine.transfer.transfers import Transfers  # its libraries are of no use otherwise

        transfers = Transfers(
            TransferOptions(
                engine_id=uuid.uuid4().hex,
                host=options.kv_transfer_host,
                port=options.kv_transfer_port,
                secret=options.kv_transfer_secret.encode() if options.kv_transfer_secret is not None else None,
                transports="auto" if options.kv_transfer == "auto" else (options.kv_transfer,),
                lease_seconds=options.kv_transfer_lease,
            )
        )
        pages = self.runner.kv_cache.keys
        fingerprint = f"{self.config} {pages.dtype} {options.block_size} {options.seed}"
        transfers.register(self.runner.kv_cache, hashlib.sha256(fingerprint.encode()).hexdigest(), self._shared)
        return transfers

    def _start_ranks(self) -> "TensorParallel | None":
        if self.options.tensor_parallel_size == 1:
            return None
        from dispec.engine.distributed.tensor_parallel import (
            TensorParallel,  # brings torch.distributed, of no use otherwise
        )

        return TensorParallel(self.options, self.device)

    def _allocate_shared(self) -> "SharedMemory | None":
        """Memory for the KV cache that engines on the same machine can read."""
        if self.options.kv_transfer not in ("auto", "shm") or self.device.type != "cpu":
            return None
        from dispec.engine.transfer.shared_memory import allocate

        return allocate(kv_cache_bytes(self.config, self.kv_plan, DTYPES[self.options.dtype]))

    def transfer_address(self) -> dict[str, Any]:
        """Where other engines can pull from this one, as `EngineInfo` has it."""
        if self._transfers is None:
            return {}
        remote_blocks = self._transfers.remote_blocks("any")
        return {
            "engine_id": remote_blocks.engine_id,
            "transfer_host": remote_blocks.host,
            "transfer_port": remote_blocks.port,
            "transfer_block_bytes": self._transfers.block_bytes,
        }

    def _activation_bytes(self, weights: Weights) -> int:
        """What the largest step takes beside weights and cache, found by running it on a cache of one block."""
        length = self.options.max_model_len or self.config.max_position_embeddings
        runner = self._make_runner(self._own_config, weights, KVPlan(2, self.options.block_size, 0, length, "probe"))
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        rows = self.options.max_num_seqs * (1 + self.options.max_num_drafts)
        runner.run_padding(self.max_num_batched_tokens, rows)
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
        threads = torch.get_num_threads()
        device = str(self.device)
        if self.device.type == "cpu":
            device += f" with {threads} thread{'' if threads == 1 else 's'}"
        log.info("%s on %s, context %d; %s", self.config.architecture, device, self.max_model_len, seconds)
        log.info("  %-12s %s", "steps", self.plan.describe())
        for name, size, note in lines:
            log.info("  %-12s %10s  %s", name, size, note)
