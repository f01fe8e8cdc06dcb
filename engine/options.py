"""The options of an engine, declared and checked in one place. No torch: the server process checks them too."""

import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from dispec.engine.machine.cpu_cores import usable_cores
from dispec.engine.option_fields import Option, check_fields, invalid_field, with_declared_fields
from dispec.engine.transfer.interface import MIN_SECRET_BYTES, Transport, is_loopback
from dispec.layers.config import ModelConfig

if TYPE_CHECKING:
    import torch

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPE_NAMES: tuple[Dtype, ...] = get_args(Dtype)


@with_declared_fields
@dataclass(frozen=True)
class EngineOptions:
    """How an engine loads and runs a model. Raises InvalidField with the option, its value and the limit.

    A `ModelConfig` as a model has random weights: it needs load_format="dummy".
    """

    model: Annotated[
        str | Path | ModelConfig,
        Option(
            "Directory, .gguf file, hub id (owner/name) or the built-in smollm2.",
            flags=("--model", "-m"),
            group="Model",
        ),
    ] = "smollm2"
    _: KW_ONLY
    dtype: Annotated[
        Literal["auto", Dtype],
        Option(
            "Type of weights that are not quantised, and of activations: bfloat16, float16 (CUDA only) or float32; auto"
            " is bfloat16.",
            group="Model",
        ),
    ] = "bfloat16"
    quantization: Annotated[
        Literal["native", "int4", "int8", "fp8", "off"] | None,
        Option(
            "Weights in fewer bits. int4, int8, fp8 (CUDA): round a checkpoint's matrices to these while loading."
            " native: keep a quantised checkpoint as it is; off: dequantise it.",
            default="native, but off for the built-in model",
            group="Model",
        ),
    ] = None
    quantization_group_size: Annotated[
        Literal[32, 64, 128] | None,
        Option("Columns that share a scale in quantization int4: 32, 64 or 128.", default="32", group="Model"),
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"],
        Option(
            "Type of the KV cache: auto is the model's; int8 and fp8 (e4m3) take half the memory of bfloat16.",
            group="Memory",
        ),
    ] = "auto"
    device: Annotated[
        str | None, Option("Where to run: cpu, cuda or cuda:N.", default="cuda if there is one", group="CPU and GPUs")
    ] = None
    kv_cache_memory: Annotated[
        int | str | None,
        Option(
            "Size of the KV cache: bytes, or such as 2GiB.",
            default="on CUDA what gpu_memory_utilization leaves free; on CPU a quarter of the free memory, or what"
            " max_num_seqs full sequences use if that is less",
            group="Memory",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Option("Share of a CUDA device's memory to use.", gt=0, le=1, group="Memory")
    ] = 0.9
    max_model_len: Annotated[
        int | None,
        Option(
            "Most tokens of a sequence, prompt and answer.", ge=2, le=2**24, default="the model's limit", group="Model"
        ),
    ] = None
    max_num_seqs: Annotated[int, Option("Most sequences that run at once.", ge=1, le=4096, group="Scheduling")] = 64
    max_num_batched_tokens: Annotated[
        int | None,
        Option(
            "Most tokens of a step, at least max_num_seqs.",
            ge=1,
            le=2**20,
            default="8192 on CUDA, 512 on CPU",
            group="Scheduling",
        ),
    ] = None
    max_prefill_chunk: Annotated[
        int | None,
        Option(
            "Most prompt tokens of one sequence in a step, and most tokens of a step with prompts and decodes.",
            ge=1,
            le=2**20,
            default="2048 on CUDA while several sequences run or wait, else the whole step",
            group="Scheduling",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        Option(
            "Compute a prefix once and share its blocks between sequences, later ones included.",
            flags=("--prefix-caching/--no-prefix-caching",),
            group="Memory",
        ),
    ] = True
    priority_aging: Annotated[
        float,
        Option(
            "Seconds of waiting that make up for one step of priority.",
            gt=0,
            le=10**9,
            unit="seconds",
            group="Scheduling",
        ),
    ] = 60.0
    async_scheduling: Annotated[
        bool | None,
        Option("Prepare a step while the device runs the one before it.", default="on with CUDA", group="Scheduling"),
    ] = None
    # 32 reads a third faster than 16 on CPU; smaller blocks share more.
    block_size: Annotated[Literal[16, 32, 64], Option("Tokens per KV block: 16, 32 or 64.", group="Memory")] = 32
    load_format: Annotated[
        Literal["auto", "dummy"],
        Option("auto reads the checkpoint; dummy makes random weights of its shapes.", group="Model"),
    ] = "auto"
    # On CPU our kernels leave nothing to gain by compiling.
    compile: Annotated[
        Literal["background", "startup", "off"] | None,
        Option(
            "When steps are compiled. startup: before the first request; background (CUDA, in a server): while no"
            " request runs, answering eagerly until then; off: never.",
            default="startup on CUDA, off on CPU",
            group="Compilation",
        ),
    ] = None
    enforce_eager: Annotated[bool, Option("Compile nothing, as compile off does.", group="Compilation")] = False
    speculative_model: Annotated[
        str | Path | ModelConfig | None,
        Option(
            "Propose draft tokens, which a step verifies together: ngram looks in the sequence's own text; else a"
            " smaller model of the same tokenizer, named as model is. Answers stay the same.",
            default="none",
            group="Speculation",
        ),
    ] = None
    num_speculative_tokens: Annotated[
        int, Option("Most draft tokens of a sequence in a step.", ge=1, le=15, group="Speculation")
    ] = 5
    tensor_parallel_size: Annotated[
        int,
        Option(
            "Processes that share every layer, each on a GPU of its own or with its part of the CPU threads.",
            ge=1,
            le=64,
            group="CPU and GPUs",
        ),
    ] = 1
    threads: Annotated[
        int | None,
        Option(
            "CPU threads of a step, set for the whole process; with --disaggregate, of each engine.",
            ge=1,
            le=1024,
            default="the usable cores by affinity and CPU quota, or OMP_NUM_THREADS if that is less",
            group="CPU and GPUs",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            "Makes what an LLM samples for requests without a seed repeatable, where they come in the same order; also"
            " seeds the random weights of load_format dummy.",
            ge=-(2**63),
            le=2**63 - 1,
            default="random, and 0 for weights",
        ),
    ] = None
    kv_transfer: Annotated[
        Literal["auto", Transport] | None,
        Option(
            "How KV blocks move between engines: shm, cuda_ipc, nixl, tcp, or auto for the fastest that both can.",
            default="not at all",
            group="KV transfer",
        ),
    ] = None
    kv_transfer_host: Annotated[str, Option("Address where other engines reach this one.", group="KV transfer")] = (
        "127.0.0.1"
    )
    kv_transfer_port: Annotated[
        int, Option("Port for other engines; 0 takes a free one.", ge=0, le=65535, group="KV transfer")
    ] = 0
    kv_transfer_secret: Annotated[
        str | None,
        Option(
            "Shared secret of engines that exchange KV blocks, at least 16 bytes; safer as a variable than as a flag.",
            default="none, on a loopback address alone",
            group="KV transfer",
        ),
    ] = field(default=None, repr=False)
    kv_transfer_lease: Annotated[
        float,
        Option(
            "Seconds for which blocks are kept for an engine that does not ask for them.",
            ge=0.1,
            le=3600,
            unit="seconds",
            group="KV transfer",
        ),
    ] = 30.0
    show_progress: Annotated[bool, Option("Draw progress bars while loading and compiling.")] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bfloat16")
        for name in ("model", "speculative_model"):
            self._check_model(name)
        if self.enforce_eager and self.compile not in (None, "off"):
            raise invalid_field("enforce_eager", f"compiles nothing, and compile is {self.compile!r}: give one of them")
        if self.quantization_group_size is not None and self.quantization != "int4":
            conflict = f"is {self.quantization_group_size} and quantization is {self.quantization!r}, must be 'int4'"
            raise invalid_field("quantization_group_size", conflict)
        if self.kv_transfer is not None and self.kv_transfer_secret is None and not is_loopback(self.kv_transfer_host):
            host = repr(self.kv_transfer_host)
            raise invalid_field("kv_transfer_host", f"is {host}, which others can reach: give a kv_transfer_secret")
        if self.kv_transfer_host in ("0.0.0.0", "::", ""):
            host = repr(self.kv_transfer_host)
            raise invalid_field("kv_transfer_host", f"is {host}, must be the address that others reach")
        if self.kv_transfer_secret is not None and len(self.kv_transfer_secret.encode()) < MIN_SECRET_BYTES:
            raise invalid_field("kv_transfer_secret", f"must have at least {MIN_SECRET_BYTES} bytes")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise invalid_field(
                "max_num_batched_tokens",
                f"is {self.max_num_batched_tokens}, must be at least max_num_seqs ({self.max_num_seqs}):"
                " every running sequence needs a token a step",
            )
        if self.tensor_parallel_size > 1:
            size = f"is {self.tensor_parallel_size}"
            if self.kv_transfer is not None:
                conflict = f"{size} and kv_transfer is {self.kv_transfer!r}: an engine of several ranks moves no KV"
                raise invalid_field("tensor_parallel_size", conflict)
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise invalid_field("device", f"is {self.device!r}, must be 'cpu', 'cuda' or 'cuda:N'")
        parse_bytes(self.kv_cache_memory)

    def _check_model(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str | Path | ModelConfig) and (value is not None or name == "model"):
            raise invalid_field(name, f"is {value!r:.50}, must be a name, a path or a ModelConfig")
        if isinstance(value, ModelConfig) and self.load_format != "dummy":
            raise invalid_field(name, "is a ModelConfig, which has no weights to load: set load_format='dummy'")

    @property
    def max_num_draft_tokens(self) -> int:
        """Most draft tokens of one sequence in a step; 0 without speculation."""
        return 0 if self.speculative_model is None else self.num_speculative_tokens

    def torch_device(self) -> "torch.device":
        """Return the device to run on. Raises ValueError if it is missing or cannot run the dtype."""
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
        """Return the number of CPU threads of a step."""
        from dispec.engine.machine.torch_threads import default_threads

        return self.threads or min(default_threads(), usable_cores())

    def when_to_compile(self, device: "torch.device") -> str:
        """Return "background", "startup" or "off" for a device."""
        if self.enforce_eager:
            return "off"
        return self.compile or ("startup" if device.type == "cuda" else "off")


def parse_bytes(value: int | str | None) -> int | None:
    """Return the number of bytes of a `kv_cache_memory` such as "512MiB", "2GiB" or "1.5GB". Raises ValueError."""
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
