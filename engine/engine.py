"""The engine: requests in, tokens out, one step at a time."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence as Series
from dataclasses import replace
from typing import Any, NamedTuple

from dispec.engine.builder import EngineBuilder, compile_pieces
from dispec.engine.errors import InvalidField
from dispec.engine.execution.kv_cache_memory import device_memory
from dispec.engine.execution.pending_step import PendingStep
from dispec.engine.options import EngineOptions
from dispec.engine.request_checks import check_priority, check_prompt_length, check_token_ids
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.choices import make_choices
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.scheduling.step_record import Kind, StepRecord
from dispec.engine.scheduling.token_output import FinishReason, TokenOutput
from dispec.engine.structured_output.grammar_compiler import Grammar
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.engine.transfer.kv_connector import KVConnector

log = logging.getLogger("dispec")

_REMOTE_WAIT_SECONDS = 0.05  # before scheduling again, while transfers to other engines hold every block


class _LaunchedStep(NamedTuple):
    """A step that was launched and not yet committed. record: without the fields that the commit adds."""

    step: SchedulerOutput
    pending: PendingStep
    record: StepRecord


class Engine:
    """Loads a model and serves sequences with it. Make it and step it in one thread, the process's main one.

    started: start times of requests that the last call of `step` scheduled for the first time, by request id.
    failed: sequences that the last call of `step` ended with an error.
    records: of the last thousand steps.
    compiled_seconds: from the start to the first compiled step, if the engine answered eagerly before.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._start_time = time.perf_counter()
        self.options = options
        parts = EngineBuilder(options).build()
        self.checkpoint = parts.checkpoint
        self.config = parts.config
        self.grammar_compiler = parts.grammar_compiler
        self.weights_format = parts.weights_format
        self.kv_plan = parts.kv_plan
        self.max_model_len = parts.kv_plan.max_model_len
        self.runner = parts.runner
        self.device = parts.runner.device
        self.plan = parts.runner.plan
        self.speculator = parts.speculator
        self.scheduler = parts.scheduler
        self.kv_connector = KVConnector(parts.scheduler, parts.transfer_engine)
        self.phase_seconds = parts.phase_seconds
        self._ranks = parts.ranks
        self.started: dict[str, float] = {}
        self.failed: list[Sequence] = []
        self.records: deque[StepRecord] = deque(maxlen=1000)
        self.compiled_seconds: float | None = None
        is_background = self.plan.compile == "background"
        self._compiling = compile_pieces(self.runner, self.speculator) if is_background else None
        self._sequence_ids = itertools.count()
        self._launched: deque[_LaunchedStep] = deque()
        self._outputs: list[TokenOutput] = []  # of the current call of `step`
        self._recorded_totals: dict[str, int] = {}  # of the KV connector, as far as records have them

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.checkpoint.eos_token_ids if self.checkpoint else ()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._launched) or self.kv_connector.has_outputs

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
        grammar: Grammar | None = None,
    ) -> Sequence:
        """Queue a prompt of token ids, and return the first of the request's `choices`, each a sequence of its own.

        request_id: names the request in outputs; None makes one.
        priority: lower goes first.
        cache_salt: the prompt shares cached prefixes only with prompts of the same salt.
        slack: seconds that the request can wait; the request with the least slack left goes first.
        publish_as: compute the prompt and one token of each choice for another engine, which pulls under this id
            (`do_remote_decode` of vLLM's `kv_transfer_params`).
        pull: where another engine publishes the prompt's keys and values (`do_remote_prefill`).
        is_resumed: wait for `resume` and the tokens that were generated elsewhere.
        grammar: of `compile_grammar`, which otherwise runs here.
        Raises ValueError, and changes nothing, if the request cannot be served; `publish_as` and `pull` need the option
        `kv_transfer`.
        """
        check_prompt_length(len(prompt), self.max_model_len)
        check_token_ids(prompt, self.config.vocab_size, "prompt")
        check_priority(priority)
        if (publish_as is not None or pull is not None) and self.kv_connector.transfer_engine is None:
            raise InvalidField(
                "kv_transfer_params",
                "kv_transfer is off: this engine neither sends its KV cache to other engines nor receives theirs",
            )
        max_tokens = min(params.token_limit, self.max_model_len - len(prompt))  # of this engine and the next together
        if publish_as is not None:
            params = replace(params, max_tokens=1, min_tokens=min(1, params.min_tokens))
        grammar = grammar or self.compile_grammar(params)
        choices = make_choices(
            prompt,
            params,
            None if grammar is None else lambda: grammar.start(max_tokens),
            ids=self._sequence_ids,
            request_id=request_id,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
            priority=priority,
            cache_salt=cache_salt,
            slack=slack,
        )
        first = choices[0]
        if pull is not None or is_resumed:
            self.kv_connector.start_receive(choices, pull, awaits_outputs=is_resumed)
            self.kv_connector.poll()
            return first
        first.forks = list(choices[1:])
        self.scheduler.add(first)
        if publish_as is not None:
            self.kv_connector.start_send(choices, publish_as)
        return first

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """Return the grammar of the parameters, if they have one. Any thread may call it.

        Raises InvalidField for a wrong grammar, and for any grammar where the model has no tokenizer.
        """
        structure = params.structure
        return None if structure is None else self.grammar_compiler.compile(structure)

    def resume(self, first: Sequence, outputs: list[list[int] | None]) -> None:
        """Set the tokens that each choice of a request with `is_resumed` has; None ends a choice."""
        self.kv_connector.resume(first, outputs)
        self.kv_connector.poll()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is, and free what it holds. The request's other choices go on."""
        self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, for a reason that the caller found, such as a stop string in its text."""
        self.scheduler.finish(sequence, reason)
        self.kv_connector.request_finished()

    def step(self) -> list[TokenOutput]:
        """Run the model once over the scheduled sequences, and return the new tokens.

        Where steps overlap, a step is launched before the previous one is waited for, and the previous one's tokens are
        returned; a call that launches nothing returns those of the last step. Without work it returns at once.
        """
        self._outputs = []
        self.started, self.failed = {}, []
        try:
            return self._step()
        except Exception as error:  # any error may be caused by one sequence alone
            log.exception("a step failed: its sequences run one by one to find the one that causes the error")
            return self._isolate_failure(error)

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
        """Compile one piece in the background, and receive what other engines have sent.

        Raises TensorParallelError if another rank has ended.
        """
        if self._ranks is not None:
            self._ranks.check()
        self.kv_connector.poll()
        if self._compiling is not None and next(self._compiling, self) is self:
            self._compiling = None
            if self.runner.is_compiled:
                self.compiled_seconds = time.perf_counter() - self._start_time
                log.info("compiled steps from here on, %.1f s after the start", self.compiled_seconds)

    def close(self) -> None:
        """Close connections to other engines, which lose what they were pulling, and end the engine's processes."""
        self._compiling = None
        self.grammar_compiler.close()
        self.kv_connector.close()
        if self._ranks is not None:
            self._ranks.close()

    def device_memory(self) -> tuple[int, int]:
        """Return the used and all bytes of the GPU, those of other processes included; zeros on a CPU."""
        return device_memory(self.device)

    def transfer_address(self) -> dict[str, Any]:
        """Return the fields of `EngineInfo` by which other engines pull from this one."""
        transfer_engine = self.kv_connector.transfer_engine
        if transfer_engine is None:
            return {}
        remote_blocks = transfer_engine.remote_blocks("any")
        return {
            "engine_id": remote_blocks.engine_id,
            "transfer_host": remote_blocks.host,
            "transfer_port": remote_blocks.port,
            "transfer_block_bytes": transfer_engine.block_bytes,
        }

    def _step(self) -> list[TokenOutput]:
        start = time.perf_counter()
        self.kv_connector.poll()
        outputs = self._outputs
        if self.speculator is not None:
            if self._launched and self.speculator.needs_result(self.scheduler.running):
                outputs += self._commit(self._launched.popleft())
            self.speculator.plan(self.scheduler.running)
        step = self.scheduler.schedule()
        overlaps = False
        if step.scheduled_sequences:
            self._launch(step, start)
            # A step that may reject draft tokens decides what the next one computes.
            overlaps = self.plan.overlaps and not self._launched[-1].record.num_draft_tokens
        outputs += self.kv_connector.take_outputs()
        while len(self._launched) > overlaps:
            outputs += self._commit(self._launched.popleft())
        if not step.scheduled_sequences and not outputs and self.scheduler.has_work:
            if not self.scheduler.kv_cache.holds_remote_blocks:
                raise RuntimeError("the scheduler has work and schedules none of it: a bug, please report it")
            self.kv_connector.wait(_REMOTE_WAIT_SECONDS)
        return outputs

    def _launch(self, step: SchedulerOutput, start: float) -> None:
        """Launch a step. start: time at which its scheduling began."""
        scheduled_at = time.perf_counter()
        draft_seconds = self.speculator.propose(step) if self.speculator is not None else 0.0
        for scheduled in step.scheduled_sequences:
            sequence = scheduled.sequence
            if sequence.scheduled_time is None:
                self.started[sequence.request_id] = start
                for choice in sequence.choices:
                    choice.scheduled_time = start
        pending = self.runner.launch(step, self.speculator.device_drafts if self.speculator is not None else None)
        launch_seconds = time.perf_counter() - scheduled_at - draft_seconds
        record = _make_record(step, self.scheduler)._replace(
            num_planned_draft_tokens=self.speculator.num_planned if self.speculator is not None else 0,
            started=start,
            schedule=scheduled_at - start,
            draft=draft_seconds,
            launch=launch_seconds,
        )
        self._launched.append(_LaunchedStep(step, pending, record))

    def _commit(self, launched: _LaunchedStep) -> list[TokenOutput]:
        """Wait for a step and return its tokens."""
        start = time.perf_counter()
        result = launched.pending.wait()
        waited = time.perf_counter()
        outputs = self.scheduler.commit(launched.step, result)
        self.kv_connector.publish()
        totals = vars(self.kv_connector.totals).copy()
        transferred = {name: total - self._recorded_totals.get(name, 0) for name, total in totals.items()}
        self._recorded_totals = totals
        record = launched.record._replace(
            wait=waited - start,
            num_finished=sum([output.finish_reason is not None for output in outputs]),
            **transferred,
        )
        if self.speculator is not None:
            # The device drafted while the host launched the step and waited for it.
            device_seconds = launched.pending.draft_seconds
            verify_seconds = max(0.0, record.schedule + record.launch + record.wait - device_seconds)
            record = record._replace(
                num_accepted_per_position=self.speculator.observe(
                    launched.step, result, verify_seconds, device_seconds
                ),
                wait=max(0.0, record.wait - device_seconds),
                draft=record.draft + device_seconds,
            )
        self.records.append(record._replace(commit=time.perf_counter() - waited))
        return outputs

    def _isolate_failure(self, error: Exception) -> list[TokenOutput]:
        """After a failed step, run each of its sequences alone for one token, and end those that fail again.

        Raises the error if the engine fails without any sequence, or for all of several: no request causes it then.
        """
        self._launched.clear()
        suspects = self.scheduler.reset()
        outputs = self._outputs  # tokens that were committed before the failure are kept
        failed = []
        for sequence in suspects:
            others = self.scheduler.isolate(sequence)
            num_output_tokens = sequence.num_output_tokens
            try:
                while self.scheduler.has_work and sequence.num_output_tokens == num_output_tokens:
                    step = self.scheduler.schedule()
                    outputs += self.scheduler.commit(step, self.runner.launch(step).wait())
                    self.kv_connector.publish()
            except Exception as own:
                sequence.error = f"{type(own).__name__}: {own}"
                failed.append(sequence)
            self.scheduler.reset()
            self.scheduler.requeue(others)
        if not suspects or len(failed) == len(suspects) > 1:
            raise error
        self.runner.run_padding(2, 1)  # raises if the device itself is lost
        for sequence in failed:
            self.finish(sequence, "error")
        self.failed = failed
        return outputs


def _make_record(step: SchedulerOutput, scheduler: Scheduler) -> StepRecord:
    """Return a step's record, without its times."""
    num_tokens = num_prompt_tokens = num_drafts = num_draft_tokens = 0
    for sequence, start, count, _, num_drafted in step.scheduled_sequences:
        num_tokens += count
        if start < sequence.num_prompt_tokens or count > 1 + num_drafted + sequence.num_forced_tokens:
            num_prompt_tokens += count
        if num_drafted:
            num_drafts += 1
            num_draft_tokens += num_drafted
    prefill_kind: Kind = "prefill" if num_prompt_tokens == num_tokens else "mixed"
    pool = scheduler.pool
    return StepRecord(
        kind=prefill_kind if num_prompt_tokens else "decode",
        num_sequences=len(step.scheduled_sequences),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=step.num_cached_tokens,
        num_preempted=step.num_preempted,
        num_admitted=step.num_admitted,
        num_running=len(scheduler.running),
        num_waiting=scheduler.num_waiting,
        num_used_blocks=pool.num_usable - pool.num_free,
        num_drafts=num_drafts,
        num_draft_tokens=num_draft_tokens,
    )
