"""The state that routes share: the engine's client, the settings, and the model once it is loaded."""

import importlib.metadata
import time
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar

from litestar import Request

from dispec.engine.loading.generation_config import generation_defaults
from dispec.engine.process.messages import EngineInfo
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.logprobs import TokenTexts
from dispec.serving.api.prompts import Prompts
from dispec.serving.api.request_body import read_body
from dispec.serving.api.responses.store import ResponseStore
from dispec.serving.chat_output.reasoning import choose_reasoning_format
from dispec.serving.chat_output.tool_formats import choose_tool_format
from dispec.serving.chat_output.tools import ToolFormat
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.errors import NotReady
from dispec.serving.http.errors import ApiError
from dispec.serving.settings import ServerSettings

T = TypeVar("T")


class ServedModel:
    """A loaded model. reasoning, tool_format: as its family writes them; None without."""

    def __init__(
        self, info: EngineInfo, tokenizer: Tokenizer | None, settings: ServerSettings, names: Sequence[str]
    ) -> None:
        self.info = info
        self.names = tuple(names) or (info.model,)
        self.prompts = Prompts(
            tokenizer,
            info.vocab_size,
            info.max_model_len,
            settings.tokenize_timeout,
            settings.allow_special_tokens_in_content,
        )
        self.reasoning = choose_reasoning_format(settings.reasoning_parser, tokenizer)
        self.tool_format: ToolFormat | None = None
        if tokenizer is not None:
            template, vocabulary = tokenizer.tool_chat_template, tokenizer.vocabulary
            self.tool_format = choose_tool_format(settings.tool_call_parser, template, vocabulary)
        self.texts = TokenTexts(tokenizer)
        uses_defaults = settings.generation_config == "auto"
        self.defaults = generation_defaults(info.directory) if uses_defaults else MappingProxyType({})

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """Raise ApiError for the name of another model. A request may leave the name out."""
        if name and name not in self.names and name != self.info.model:
            known = " or ".join(map(repr, self.names))
            raise ApiError(
                404, f"model is {name!r:.100}, this server has {known}", param="model", code="model_not_found"
            )


class ApiContext:
    """The state of one server."""

    def __init__(self, client: EngineClient, settings: ServerSettings, names: Sequence[str] = ()) -> None:
        self.client = client
        self.settings = settings
        self.responses = ResponseStore(settings.max_stored_responses, settings.max_stored_response_bytes)
        self.started = time.time()
        self._started = time.monotonic()  # the wall clock may be set meanwhile
        self._names = tuple(names) or settings.served_model_name
        self._model: ServedModel | None = None

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self._started

    def model(self) -> ServedModel:
        """Return the model. Raises NotReady until it is loaded."""
        info = self.client.info
        if info is None:
            raise self._not_ready()
        if self._model is None or self._model.info is not info:
            self._model = ServedModel(info, self.client.tokenizer, self.settings, self._names)
        return self._model

    def open_model(self) -> ServedModel:
        """Return the model for a new request. Raises NotReady if the engine takes none."""
        if self.client.state != "ready":
            self.client.report_refusal()
            raise self._not_ready()
        return self.model()

    def _not_ready(self) -> NotReady:
        return NotReady(self.client.is_ready()[1])

    async def body(self, request: Request, form: type[T]) -> T:
        """Return the request's body as a struct. Raises as `read_body`."""
        return await read_body(request, form, self.settings.max_body_bytes, self.settings.tokenize_timeout)

    @cached_property
    def version(self) -> str:
        return version()


def context_of(request: Request) -> ApiContext:
    """Return the state that `create_app` stored."""
    return request.app.state["context"]


def version() -> str:
    """Return the installed version; "0" where DiSpec is not installed."""
    try:
        return importlib.metadata.version("dispec")
    except importlib.metadata.PackageNotFoundError:
        return "0"
