"""Errors that a user can cause. This file imports nothing: the server process uses it without torch."""

LESS_MEMORY_HINT = "lower kv_cache_memory, max_model_len or max_num_seqs"


class CheckpointError(ValueError):
    """A model cannot be found, downloaded or read; the message is one sentence that names it and says what to do."""


class InvalidField(ValueError):
    """A field of a request breaks a rule. `field` is its name at the top level of the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ContextOverflow(InvalidField):
    """A prompt leaves no room in the context for an answer.

    The message has the phrases by which clients recognize the error: "this model's maximum context length is" (vLLM,
    LiteLLM) and "prompt is too long" (LangChain).
    """

    def __init__(self, field: str, holds: str, max_model_len: int) -> None:
        """holds: the part of the request that is too long and its length, as in "prompt has 600 tokens"."""
        limit = f"must be below max_model_len ({max_model_len})"
        known_as = f"the prompt is too long, this model's maximum context length is {max_model_len} tokens"
        super().__init__(field, f"{holds}, {limit}: {known_as}")
