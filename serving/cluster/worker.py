"""One engine of a pool: its role, and counts of its work."""

from dataclasses import dataclass, field

from dispec.engine.process.messages import Role
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.engine_client import EngineObserver
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.client.request_stream import RequestStream
from dispec.serving.observability.distribution import BETWEEN_TOKENS, FIRST_TOKEN, STEP, Distribution

ROLES: tuple[Role, ...] = ("prefill", "decode")


class WorkerStatistics(EngineObserver):
    """The work of an engine since its first start.

    num_prompt_tokens: computed here; num_output_tokens: generated here, by requests that have ended. ttft: seconds from
    the engine's receipt of a request to its first token of it; itl: between its tokens; step: of a step.
    num_received_prompts, num_failed_receives, num_sent_prompts: prompts with KV that came, that did not come, and that
    was published for other engines; num_received_blocks and num_sent_blocks: their blocks.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_output_tokens = self.num_requests = self.num_preemptions = 0
        self.num_received_prompts = self.num_failed_receives = self.num_sent_prompts = 0
        self.num_received_blocks = self.num_sent_blocks = 0
        self.ttft, self.itl, self.step = Distribution(FIRST_TOKEN), Distribution(BETWEEN_TOKENS), Distribution(STEP)

    def on_step(self, record: StepRecord, finished: float) -> None:
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_preemptions += record.num_preempted
        self.num_received_prompts += record.num_received_prompts
        self.num_failed_receives += record.num_failed_receives
        self.num_sent_prompts += record.num_sent_prompts
        self.num_received_blocks += record.num_received_blocks
        self.num_sent_blocks += record.num_sent_blocks
        self.step.add([record.seconds])

    def on_first_token(self, stream: RequestStream) -> None:
        self.ttft.add([stream.timing.ttft])

    def on_request_finished(self, stream: RequestStream) -> None:
        self.num_requests += 1
        self.num_output_tokens += stream.num_output_tokens
        self.itl.add(stream.gaps)


@dataclass(eq=False)
class Worker:
    """An engine of a pool.

    place: its number among the present ones, which decides its GPU; its replacement takes it over.
    is_leaving: it gets no new requests, and is removed when it has none left.
    """

    number: int
    role: Role
    client: ProcessClient
    place: int
    is_leaving: bool = False
    statistics: WorkerStatistics = field(default_factory=WorkerStatistics)

    @property
    def is_ready(self) -> bool:
        return self.client.state == "ready" and not self.is_leaving
