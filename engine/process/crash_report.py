"""The report of an engine that cannot start or continue: the error, and what to do."""

import traceback

from dispec.engine.errors import LESS_MEMORY_HINT, CheckpointError
from dispec.engine.process.messages import CrashReport

_LESS_DEVICE_MEMORY = (
    "lower gpu_memory_utilization, max_num_seqs or max_num_batched_tokens, or see with nvidia-smi which other processes"
    " use the GPU"
)


def report_crash(error: BaseException) -> CrashReport:
    """Return the report of an error. An unexpected error brings its traceback."""
    message = " ".join(str(error).split()) or "no further message"
    return CrashReport(
        error=type(error).__name__,
        message=message if len(message) <= 1000 else f"{message[:1000]}…",
        hint=_hint(error, message),
        is_bad_input=isinstance(error, ValueError),
        traceback="" if isinstance(error, ValueError | MemoryError) else "".join(traceback.format_exception(error)),
    )


def _hint(error: BaseException, message: str) -> str:
    # Classes of torch are compared by name: they cannot be imported where torch cannot.
    name = type(error).__name__
    if name == "OutOfMemoryError" or "CUDA out of memory" in message:
        return _LESS_DEVICE_MEMORY
    if isinstance(error, MemoryError) or "allocate memory" in message:
        return LESS_MEMORY_HINT
    if isinstance(error, CheckpointError):
        return "give a model directory, a .gguf file or a hub id, or no model at all for the built-in one"
    if name == "UnsupportedModelError":
        return "`dispec serve` without a model serves the built-in one"
    if name == "TensorParallelError":
        return (
            "the log above may say why; if that rank's process was not killed by hand, the system ran out of memory: "
            f"{LESS_MEMORY_HINT}"
        )
    if isinstance(error, ValueError):
        return "change the option that it names; `dispec serve --help` lists them"
    if isinstance(error, ImportError):
        return "install DiSpec again, or run `dispec env-check`"
    if "CUDA" in message or name == "AcceleratorError":
        return "the GPU or its driver failed: `dispec env-check` and nvidia-smi say what works"
    if name in ("BackendCompilerFailed", "InductorError", "InvalidCxxCompiler", "CppCompileError"):
        return "--compile off serves without compiling; `dispec env-check` looks for the compiler"
    if isinstance(error, OSError):
        return "see that the files are there and readable, and that the disk is not full"
    return "this is a bug: please report it with the traceback in the log"
