"""What an engine can be told at start, checked in one place. It loads no torch: the server checks its options too."""

import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from dispec.engine.machine.cpu_cores import usable_cores
from dispec.engine.transfer.interface import TRANSPORTS, is_loopback
from dispec.engine.unknown_names import with_checked_names
from dispec.layers.config import ModelConfig

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("bfloat16", "float16", "float32")
BLOCK_SIZES = (16, 32, 64)
COMPILE = ("background", "startup", "off")

_COUNTS = (
    "block_size",
    "max_num_seqs",
    "num_speculative_tokens",
    "tensor_parallel_size",
    "seed",
    "kv_transfer_port",
)


@with_checked_names
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Raises ValueError with the option, its value and the limit.

    model: a directory, a hub id, a .gguf file, the built-in "smollm2", or a ModelConfig for dummy weights.
    dtype: "bfloat16", "float16" (CUDA only) or "float32".
    device: "cpu", "cuda" or "cuda:N"; None takes CUDA where there is one.
    kv_cache_memory: bytes, or a string such as "2GiB". None takes what is free on CUDA up to
        `gpu_memory_utilization` of the device, and on CPU a quarter of the free memory or what `max_num_seqs`
        full sequences can use, if that is less.
    max_model_len: most tokens of a sequence, prompt and output; None takes the model's own limit.
    max_num_seqs: most sequences that run at once.
    max_num_batched_tokens: most tokens of a step, at least max_num_seqs; None takes 8192 on CUDA, 512 on CPU.
    max_prefill_chunk: most prompt tokens of one sequence in a step; None takes 2048 on CUDA, the whole step on CPU.
    enable_prefix_caching: compute a prefix once and share its blocks between sequences, later ones included.
    priority_aging: seconds of waiting that make up for one step of priority.
    async_scheduling: prepare a step while the device runs the one before it; None does so on CUDA. A step whose number
        of draft tokens depends on what the one before it samples waits for that.
    block_size: tokens per KV block: 16, 32 or 64. 32 reads a third faster than 16 on CPU; smaller blocks share more.
    load_format: "auto" reads the checkpoint, "dummy" makes random weights of its shapes, for which its config and
        tokenizer are enough.
    compile: "startup" compiles before the first request; "background" (CUDA, in a server) answers at once, slower, and
        compiles when there is nothing else to do; "off" compiles nothing. None takes "startup" on CUDA, "off" on CPU,
        where our kernels leave nothing to gain by it.
    enforce_eager: the same as compile="off".
    speculative_model: who guesses tokens ahead, for steps that verify several at once: "ngram" looks in the sequence's
        own text; else a smaller model with the same tokenizer, named as `model` is, whose matrices a CPU with
        AVX2 or AVX512 keeps in 8 bits where dtype is bfloat16. None guesses nothing. Answers are the same either way.
    num_speculative_tokens: most tokens to guess for a sequence in a step; as many as pay are.
    tensor_parallel_size: processes that share every layer among them, each on a GPU of its own, or with its part of
        the CPU's threads.
    threads: CPU threads of a step; None takes the cores that the process may use, by affinity and CPU quota, or
        OMP_NUM_THREADS if that is less. Torch knows one number for the whole process: the engine sets it.
    seed: of the random weights that load_format "dummy" makes.
    kv_transfer: how KV blocks go to and come from other engines: "shm", "cuda_ipc", "nixl", "tcp", or "auto", which
        takes the fastest that the peer can; None keeps them here.
    kv_transfer_host, kv_transfer_port: where other engines reach this one; port 0 takes a free one.
    kv_transfer_secret: what they must know, at least 16 bytes; it can be left out on a loopback address.
    kv_transfer_lease: seconds for which blocks are kept for an engine that does not ask for them.
    """

    model: str | Path | ModelConfig = "smollm2"
    dtype: str = "bfloat16"
    device: str | None = None
    kv_cache_memory: int | str | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_prefill_chunk: int | None = None
    enable_prefix_caching: bool = True
    priority_aging: float = 60.0
    async_scheduling: bool | None = None
    block_size: int = 32
    load_format: str = "auto"
    compile: str | None = None
    enforce_eager: bool = False
    speculative_model: str | Path | ModelConfig | None = None
    num_speculative_tokens: int = 5
    tensor_parallel_size: int = 1
    threads: int | None = None
    seed: int = 0
    kv_transfer: str | None = None
    kv_transfer_host: str = "127.0.0.1"
    kv_transfer_port: int = 0
    kv_transfer_secret: str | None = field(default=None, repr=False)
    kv_transfer_lease: float = 30.0

    @property
    def max_num_drafts(self) -> int:
        """Most guesses of one sequence in a step."""
        return 0 if self.speculative_model is None else self.num_speculative_tokens

    def __post_init__(self) -> None:
        self._check_types()
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPE_NAMES)}")
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format is {self.load_format!r}, must be 'auto' or 'dummy'")
        if isinstance(self.model, ModelConfig) and self.load_format != "dummy":
            raise ValueError("model is a ModelConfig, which has no weights to load: set load_format='dummy'")
        if self.compile is not None and self.compile not in COMPILE:
            raise ValueError(f"compile is {self.compile!r}, must be one of {', '.join(COMPILE)}")
        if self.enforce_eager and self.compile not in (None, "off"):
            raise ValueError(f"enforce_eager compiles nothing, and compile is {self.compile!r}: give one of them")
        if self.kv_transfer not in (None, "auto", *TRANSPORTS):
            raise ValueError(f"kv_transfer is {self.kv_transfer!r}, must be one of auto, {', '.join(TRANSPORTS)}")
        if self.kv_transfer is not None and self.kv_transfer_secret is None and not is_loopback(self.kv_transfer_host):
            raise ValueError(
                f"kv_transfer_host is {self.kv_transfer_host!r}, which others can reach: give a kv_transfer_secret"
            )
        if self.kv_transfer_host in ("0.0.0.0", "::", ""):
            raise ValueError(f"kv_transfer_host is {self.kv_transfer_host!r}, must be the address that others reach")
        if self.kv_transfer_secret is not None and len(self.kv_transfer_secret.encode()) < 16:
            raise ValueError("kv_transfer_secret must have at least 16 bytes")
        if not 0.1 <= self.kv_transfer_lease <= 3600:
            raise ValueError(f"kv_transfer_lease is {self.kv_transfer_lease}, must be between 0.1 and 3600 seconds")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size}, must be one of {BLOCK_SIZES}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {self.gpu_memory_utilization}, must be in (0, 1]")
        for name, low, high in (
            ("max_model_len", 2, 2**24),
            ("max_num_seqs", 1, 4096),
            ("max_num_batched_tokens", 1, 2**20),
            ("max_prefill_chunk", 1, 2**20),
            ("num_speculative_tokens", 1, 15),
            ("tensor_parallel_size", 1, 64),
            ("threads", 1, 1024),
            ("kv_transfer_port", 0, 65535),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be between {low} and {high}")
        if not 0 < self.priority_aging <= 1e9:
            raise ValueError(f"priority_aging is {self.priority_aging}, must be above 0 and at most 1e9 seconds")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, must be at least max_num_seqs"
                f" ({self.max_num_seqs}): every running sequence needs a token a step"
            )
        if isinstance(self.speculative_model, ModelConfig) and self.load_format != "dummy":
            raise ValueError(
                "speculative_model is a ModelConfig, which has no weights to load: set load_format='dummy'"
            )
        if self.tensor_parallel_size > 1:
            self._check_ranks()
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}, must be 'cpu', 'cuda' or 'cuda:N'")
        parse_bytes(self.kv_cache_memory)

    def _check_types(self) -> None:
        for name in ("model", "speculative_model"):
            value = getattr(self, name)
            if not isinstance(value, str | Path | ModelConfig) and (value is not None or name == "model"):
                raise ValueError(f"{name} is {value!r:.50}, must be a name, a path or a ModelConfig")
        for name in ("device", "kv_transfer_host", "kv_transfer_secret"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "kv_transfer_host"):
                raise ValueError(f"{name} is {type(value).__name__}, must be a text")
        for name in ("max_model_len", "max_num_batched_tokens", "max_prefill_chunk", "threads", *_COUNTS):
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer and (value is not None or name in _COUNTS):
                raise ValueError(f"{name} is {value!r:.50}, must be an integer")
        for name in ("gpu_memory_utilization", "priority_aging", "kv_transfer_lease"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} is {getattr(self, name)!r:.50}, must be a number")

    def _check_ranks(self) -> None:
        size = f"tensor_parallel_size is {self.tensor_parallel_size}"
        if self.kv_transfer is not None:
            raise ValueError(f"{size} and kv_transfer is {self.kv_transfer!r}: an engine of several ranks moves no KV")
        if self.speculative_model not in (None, "ngram"):
            raise ValueError(f"{size} and there is a speculative_model: several ranks speculate with 'ngram' alone")

    def torch_device(self) -> "torch.device":
        """The device to run on. Raises ValueError if it is not there or cannot run the dtype."""
        import torch

        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(name)
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if not torch.cuda.is_available() or (device.index or 0) >= count:
                raise ValueError(f"device is {name!r}, but torch sees {count} CUDA devices")
            if (device.index or 0) + self.tensor_parallel_size > count:
                raise ValueError(
                    f"tensor_parallel_size is {self.tensor_parallel_size} from device {name!r} on, but torch sees"
                    f" {count} CUDA devices"
                )
            device = torch.device("cuda", device.index or 0)
        elif self.dtype == "float16":
            raise ValueError("dtype is 'float16', which runs on CUDA only: use bfloat16 or float32 on CPU")
        if device.type == "cpu" and self.compile == "background":
            raise ValueError("compile is 'background', which is for CUDA: on CPU use startup or off")
        if device.type == "cpu" and self.compile == "startup" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"compile is 'startup' and tensor_parallel_size is {self.tensor_parallel_size}: several ranks on CPU"
                " compile nothing, use off"
            )
        return device

    def num_threads(self) -> int:
        """CPU threads of a step."""
        from dispec.engine.machine.torch_threads import default_threads

        return self.threads or min(default_threads(), usable_cores())

    def when_to_compile(self, device: "torch.device") -> str:
        """Return one of `COMPILE`."""
        if self.enforce_eager:
            return "off"
        return self.compile or ("startup" if device.type == "cuda" else "off")


def parse_bytes(value: int | str | None) -> int | None:
    """Bytes from an int or a string such as "512MiB", "2GiB", "1.5GB". Raises ValueError."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"kv_cache_memory is {value!r}, must be bytes or a size such as '2GiB'")
    number, prefix, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size < 1:
        raise ValueError(f"kv_cache_memory is {value!r}, must be at least 1 byte")
    return size
