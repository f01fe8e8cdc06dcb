"""Messages between the server (the frontend) and an engine process: msgpack over ZeroMQ, never pickle.

The frontend starts the engine with `Start` and sends `FrontendMessage`s; the engine answers with `EngineMessage`s.
Times are seconds on the clock of `time.perf_counter`, which on Linux is one for all processes.
"""

from typing import Any, Literal

import msgspec

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.transfer.interface import RemoteBlocks

EXIT_AFTER_CRASH_REPORT = 70  # the exit code of an engine process that has sent a `CrashReport`


Role = Literal["prefill", "decode"]


class SharedCores(msgspec.Struct):
    """What a worker needs for `CorePriority`: a file that the workers of the machine share, and its own role."""

    path: str
    role: Role


class WorkerPlace(msgspec.Struct):
    """A worker's number among those of its pool, which share the GPUs of the machine."""

    number: int
    num_workers: int


class Start(msgspec.Struct):
    """The first line of the engine's standard input, as JSON.

    options: the fields of `EngineOptions`. shared_cores: where other engines run on the same cores. place: of a worker.
    """

    options: dict[str, Any]
    shared_cores: SharedCores | None = None
    place: WorkerPlace | None = None


class Submit(msgspec.Struct, tag=True):
    """A tokenized request: the arguments of `Engine.add`.

    params: the fields of `SamplingParams` without texts (`stop`, `bad_words`).
    is_resumed: a `Resume` follows.
    """

    request_id: str
    prompt: list[int]
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str | None = None
    slack: float = 0.0
    publish_as: str | None = None
    pull: RemoteBlocks | None = None
    is_resumed: bool = False


class Resume(msgspec.Struct, tag=True):
    """The tokens that each choice of a request has generated in another engine; None for a choice that has ended."""

    request_id: str
    outputs: list[list[int] | None]


class Abort(msgspec.Struct, tag=True):
    """End a request, or one of its choices, which the client has left or a stop string ends."""

    request_id: str
    choice: int | None = None
    reason: Literal["abort", "stop"] = "abort"


class Inspect(msgspec.Struct, tag=True):
    """Ask for an `Inspection`. verify: with `Scheduler.check`, whose time grows with the number of blocks."""

    verify: bool = True


class Shutdown(msgspec.Struct, tag=True):
    """End the engine process, with requests under way or not."""


class EngineInfo(msgspec.Struct, tag=True):
    """A description of the engine, which is ready.

    weights_format: in words, with the format of the files if it is another one.
    directory: of the checkpoint's tokenizer, for `Tokenizer.from_directory`; None for a `ModelConfig`.
    engine_id, transfer_host, transfer_port: the address from which other engines pull KV blocks, if they can.
    transfer_block_bytes: of a block that is pulled, without a draft model's part.
    compile: when steps are compiled: "off", "startup" or "background".
    compiled_seconds: from the engine's start to its first compiled step, if it answered eagerly before; else None.
    """

    model: str
    architecture: str
    directory: str | None
    dtype: str
    weights_format: str
    device: str
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_cache_bytes: int
    is_compiled: bool
    phase_seconds: dict[str, float]
    pid: int
    engine_id: str | None = None
    transfer_host: str | None = None
    transfer_port: int | None = None
    transfer_block_bytes: int = 0
    compile: str = "off"
    compiled_seconds: float | None = None


class Accepted(msgspec.Struct, tag=True):
    """A request was queued."""

    request_id: str


class Refused(msgspec.Struct, tag=True):
    """A request cannot be served. field: the one that breaks a rule, if known."""

    request_id: str
    message: str
    field: str | None = None


class StepOutput(msgspec.Struct, tag=True):
    """The tokens of a step.

    started: start times of requests that the step scheduled for the first time, by request id.
    finished: time at the end of the step.
    """

    tokens: list[TokenOutput]
    record: StepRecord | None
    started: dict[str, float]
    finished: float


class Failed(msgspec.Struct, tag=True):
    """An error in the engine ended this request alone."""

    request_id: str
    message: str


class Inspection(msgspec.Struct, tag=True):
    """Counts of requests, of their choices and of KV blocks. problem: the assertion of `Scheduler.check` that failed.

    num_requests: requests that have not ended; num_running and num_waiting count their choices.
    device_memory_used, device_memory_total: bytes of the GPU, those of other processes included; 0 on a CPU.
    """

    num_requests: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_cached_blocks: int
    num_blocks: int
    problem: str | None
    device_memory_used: int = 0
    device_memory_total: int = 0


class IsCompiled(msgspec.Struct, tag=True):
    """Steps are compiled from now on. seconds: since the engine's start."""

    seconds: float


class Log(msgspec.Struct, tag=True):
    """A line for the log, which the frontend writes. level: of `logging`."""

    level: int
    text: str


class CrashReport(msgspec.Struct, tag=True):
    """The engine could not start, or cannot continue. It is the last message of its process.

    error: the class of the exception. hint: what to do. traceback: of an unexpected error.
    is_bad_input: an option or a file that the user gave is at fault; the message says it all.
    """

    error: str
    message: str
    hint: str
    traceback: str = ""
    is_bad_input: bool = False


FrontendMessage = Submit | Resume | Abort | Inspect | Shutdown
EngineMessage = EngineInfo | Accepted | Refused | StepOutput | Failed | Inspection | IsCompiled | Log | CrashReport


def encode(message: FrontendMessage | EngineMessage) -> bytes:
    return msgspec.msgpack.encode(message)


def encode_params(params: SamplingParams) -> dict[str, Any]:
    """Return the fields that differ from their defaults, as plain values."""
    defaults = SamplingParams()
    found = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    changed = {name: value for name, value in found.items() if value != getattr(defaults, name)}
    if params.structure is not None:
        changed["structured_outputs"] = params.structure.as_mapping()
    return {name: dict(value) if name == "logit_bias" else value for name, value in changed.items()}
