"""What the routes share: the engine, the settings, and what follows from the model once it is loaded."""

import importlib.metadata
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from litestar import Request

from dispec.engine.process.messages import EngineInfo
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.logprobs import TokenTexts
from dispec.serving.api.prompts import Prompts
from dispec.serving.api.protocol_sampling import GENERATION_DEFAULTS
from dispec.serving.api.request_decoding import decode_body
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.errors import NotReady
from dispec.serving.http.body import read_body
from dispec.serving.http.errors import ApiError
from dispec.serving.settings import ServerSettings

log = logging.getLogger("dispec.server")

T = TypeVar("T")


def version() -> str:
    try:
        return importlib.metadata.version("dispec")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class ServedModel:
    """A model that is loaded, as the routes need it."""

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
        self.texts = TokenTexts(tokenizer)
        is_asked = settings.generation_config == "auto"
        self.defaults = generation_defaults(info.directory) if is_asked else MappingProxyType({})

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """Raises ApiError for the name of another model. None will do."""
        if name and name not in self.names and name != self.info.model:
            known = " or ".join(map(repr, self.names))
            raise ApiError(
                404, f"model is {name!r:.100}, this server has {known}", param="model", code="model_not_found"
            )

    def room(self, num_prompt_tokens: int) -> int:
        """How many tokens fit after a prompt."""
        return self.info.max_model_len - num_prompt_tokens


class ApiContext:
    """Of one server."""

    def __init__(self, client: EngineClient, settings: ServerSettings, names: Sequence[str] = ()) -> None:
        self.client = client
        self.settings = settings
        self.started = time.time()  # for clients; how long ago that was is not for the wall clock to say
        self._started = time.monotonic()
        self._names = tuple(names) or settings.served_model_name
        self._model: ServedModel | None = None

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self._started

    def model(self) -> ServedModel:
        """Raises NotReady until it is loaded."""
        info = self.client.info
        if info is None:
            raise NotReady(self.client.is_ready()[1], 5)
        if self._model is None or self._model.info is not info:
            self._model = ServedModel(info, self.client.tokenizer, self.settings, self._names)
        return self._model

    def open_model(self) -> ServedModel:
        """The same, for work: raises NotReady if the engine takes none."""
        if self.client.state != "ready":
            raise NotReady(self.client.is_ready()[1], 5)
        return self.model()

    async def body(self, request: Request, form: type[T]) -> T:
        """The request's body as a struct. Raises ApiError."""
        body = await read_body(request, self.settings.max_body_bytes, self.settings.tokenize_timeout)
        return decode_body(body, form)

    @cached_property
    def version(self) -> str:
        return version()


def service_of(request: Request) -> ApiContext:
    return request.app.state["service"]


def generation_defaults(directory: str | None) -> Mapping[str, Any]:
    """How the checkpoint's makers want it sampled, from its generation_config.json. Nothing if there is none."""
    path = None if directory is None else Path(directory) / "generation_config.json"
    if path is None or not path.is_file():
        return MappingProxyType({})
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): requests are sampled with the usual defaults", path, error)
        return MappingProxyType({})
    found = {name: stated.get(name) for name in GENERATION_DEFAULTS} if isinstance(stated, dict) else {}
    return MappingProxyType(
        {name: value for name, value in found.items() if type(value) in (int, float) and value is not True}
    )
