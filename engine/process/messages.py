"""What the front process and the engine process say to each other: msgpack over a local socket, never pickle.

The front starts the engine with `Start` and sends `Submit`, `Resume`, `Abort`, `Inspect` and `Shutdown`; the engine
answers with the rest. Times are seconds on the clock of `time.perf_counter`, which on Linux is one for all processes.
"""

from typing import Any, Literal

import msgspec

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.scheduler_output import TokenOutput
from dispec.engine.scheduling.step_record import StepRecord
from dispec.engine.transfer.interface import RemoteBlocks

EXIT_AFTER_LAST_WORDS = 70  # of an engine process that could send `Died`


class Start(msgspec.Struct):
    """The first line of the engine's standard input, as JSON. `options` are the fields of `EngineOptions`.

    num_threads: for its steps; None takes a thread for each core.
    """

    options: dict[str, Any]
    show_progress: bool = False
    num_threads: int | None = None


class Submit(msgspec.Struct, tag=True):
    """A request, tokenised. `params` are the fields of `SamplingParams`, without texts (stop, bad_words).

    slack: seconds that it can wait.
    publish_as: compute the prompt and one token for another engine, under this transfer id.
    pull: where the prompt's KV comes from. is_resumed: a `Resume` will follow, with the tokens that there are already.
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
    """What each choice of a request has generated elsewhere; None for a choice that has ended."""

    request_id: str
    outputs: list[list[int] | None]


class Abort(msgspec.Struct, tag=True):
    """End a request, or one of its choices: because nobody wants it any more, or because its text holds a stop."""

    request_id: str
    choice: int | None = None
    reason: Literal["abort", "stop"] = "abort"


class Inspect(msgspec.Struct, tag=True):
    """Ask for an `Inspection`."""


class Shutdown(msgspec.Struct, tag=True):
    """Leave, whatever is under way."""


class EngineInfo(msgspec.Struct, tag=True):
    """The engine is ready, and this is what it serves.

    directory: of the checkpoint's tokenizer, for `Tokenizer.from_directory`; None for dummy weights.
    engine_id, transfer_host, transfer_port: where other engines can pull KV from; None if they cannot.
    transfer_block_bytes: of a block that is pulled, which is without a draft model's part.
    compile: when steps are compiled: "off", "startup" or "background".
    compiled_seconds: from the engine's start to its first compiled step, if it answered eagerly before; else None.
    """

    model: str
    architecture: str
    directory: str | None
    dtype: str
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
    """A request is in the queue."""

    request_id: str


class Refused(msgspec.Struct, tag=True):
    """A request that cannot be served as it is; the engine goes on. `field` is the one that breaks a rule, if known."""

    request_id: str
    message: str
    field: str | None = None


class StepOutput(msgspec.Struct, tag=True):
    """What a step gave.

    started: when requests were scheduled for the first time; finished: when the step ended.
    """

    tokens: list[TokenOutput]
    record: StepRecord | None
    started: dict[str, float]
    finished: float


class Failed(msgspec.Struct, tag=True):
    """An error in the engine that ended this request and no other."""

    request_id: str
    message: str


class Inspection(msgspec.Struct, tag=True):
    """The books, as `Scheduler.check` proved them; `problem` where it could not.

    num_requests: that have not ended; num_running and num_waiting count their choices.
    """

    num_requests: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_cached_blocks: int
    num_blocks: int
    problem: str | None


class IsCompiled(msgspec.Struct, tag=True):
    """Steps are compiled from now on, `seconds` after the engine's start."""

    seconds: float


class Log(msgspec.Struct, tag=True):
    """A line for the log, which the front writes. `level` is one of `logging`'s."""

    level: int
    text: str


class Died(msgspec.Struct, tag=True):
    """The engine's last words: it could not start, or cannot go on.

    error: the class of the exception; hint: what to do about it; traceback: where it came from, if that is of use.
    is_bad_input: an option or a file that the user gave is at fault; then the message says all.
    """

    error: str
    message: str
    hint: str
    traceback: str = ""
    is_bad_input: bool = False


FromFront = Submit | Resume | Abort | Inspect | Shutdown
FromEngine = EngineInfo | Accepted | Refused | StepOutput | Failed | Inspection | IsCompiled | Log | Died


def encode(message: FromFront | FromEngine) -> bytes:
    return msgspec.msgpack.encode(message)


def encode_params(params: SamplingParams) -> dict[str, Any]:
    """Fields that differ from their defaults, as plain values."""
    defaults = SamplingParams()
    found = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    changed = {name: value for name, value in found.items() if value != getattr(defaults, name)}
    return {name: dict(value) if name == "logit_bias" else value for name, value in changed.items()}
