"""One engine of several: what it is there for, and what it has done."""

from dataclasses import dataclass, field
from typing import Literal

from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.admission import PromptRate
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.listener import Listener
from dispec.serving.client.request_stream import FirstToken, RequestSummary
from dispec.serving.observability.distribution import Distribution
from dispec.serving.observability.metric_buckets import BETWEEN_TOKENS, FIRST_TOKEN, STEP

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")


class WorkerTally(Listener):
    """What an engine has done since it was first started, for whoever asks.

    num_prompt_tokens: computed here. num_output_tokens: generated here, by requests that have ended. ttft: from being
    given a request to the first token that came from here; itl: between such tokens.
    num_received_prompts, num_failed, num_sent_prompts: prompts whose keys and values came, did not come, and were
    published for others; num_received_blocks and num_sent_blocks: blocks of them.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_output_tokens = self.num_requests = self.num_preemptions = 0
        self.num_received_prompts = self.num_failed = self.num_sent_prompts = 0
        self.num_received_blocks = self.num_sent_blocks = 0
        self.ttft, self.itl, self.step = Distribution(FIRST_TOKEN), Distribution(BETWEEN_TOKENS), Distribution(STEP)

    def on_step(self, record: StepRecord, finished: float) -> None:
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_preemptions += record.num_preempted
        self.num_received_prompts += record.num_received_prompts
        self.num_failed += record.num_failed_receives
        self.num_sent_prompts += record.num_sent_prompts
        self.num_received_blocks += record.num_received_blocks
        self.num_sent_blocks += record.num_sent_blocks
        self.step.add([record.seconds])

    def on_first_token(self, first: FirstToken) -> None:
        self.ttft.add([first.seconds])

    def on_request_finished(self, summary: RequestSummary) -> None:
        self.num_requests += 1
        self.num_output_tokens += summary.output_tokens
        self.itl.add(summary.gaps)


@dataclass(eq=False)
class Worker:
    """An engine. is_leaving: it gets nothing new, and goes when it has nothing left to do."""

    number: int
    role: Role
    client: EngineClient
    is_leaving: bool = False
    num_used_blocks: int = 0
    prompt_rate: PromptRate = field(default_factory=PromptRate)
    tally: WorkerTally = field(default_factory=WorkerTally)

    @property
    def is_ready(self) -> bool:
        return self.client.state == "ready" and not self.is_leaving

    @property
    def kv_usage(self) -> float:
        """Share of its KV blocks that its last step used."""
        info = self.client.info
        return self.num_used_blocks / info.num_blocks if info is not None and self.client.load else 0.0

    def note(self, record: StepRecord) -> None:
        """A step of it has ended."""
        self.num_used_blocks = record.num_used_blocks
        self.prompt_rate.note(record)
