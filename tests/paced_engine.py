"""A scripted engine behind a real HTTP server in a thread, for pages: a test decides how far an answer is."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from dispec.engine.process.messages import Inspection
from dispec.serving.api.app import create_app
from dispec.serving.client.engine_client import State
from dispec.serving.client.errors import NotReady
from dispec.serving.client.output_processor import OutputProcessor
from dispec.serving.client.request_stream import GenerationRequest, RequestError, RequestStream
from dispec.serving.dashboard.routes_dashboard import dashboard_router
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.scripted_engine import ScriptedEngine
from tests.servers import wait_for


class PacedEngine(ScriptedEngine):
    """Answers with one choice.

    num_allowed: tokens of each answer that come; the others wait until it is raised. None: all.
    failure: ends an answer after those tokens. is_loading: the engine refuses requests.
    """

    num_allowed: int | None = None
    failure: RequestError | None = None
    is_loading = False

    @property
    def state(self) -> State:
        return "loading" if self.is_loading else "ready"

    def is_ready(self) -> tuple[bool, str]:
        return not self.is_loading, "the model is being loaded" if self.is_loading else ""

    async def inspect(self, *, verify: bool = True) -> Inspection:
        raise NotReady("there is no engine")

    async def _run(self, stream: RequestStream, texts: list[str]) -> None:
        request: GenerationRequest = stream.request
        processor = OutputProcessor(
            self._tokenizer, request.params, request.prompt_token_ids, kept_token_ids=request.kept_token_ids
        )
        stream.accept()
        for number, output in enumerate(self._outputs(0, texts[0], request.params)):
            while self.num_allowed is not None and number >= self.num_allowed and not stream.has_ended:
                if self.failure is not None:
                    stream.end("error", self.failure)
                await asyncio.sleep(0.005)
            if not stream.has_ended and (update := processor.process(output)):
                stream.take(update, 0.0)
            await asyncio.sleep(0)
        del self._streams[stream.key]


@contextmanager
def served(engine: ScriptedEngine, **settings: object) -> Iterator[str]:
    """Yield the address of a server of the engine, with the dashboard."""
    made = ServerSettings(**settings)  # type: ignore[arg-type]
    app = create_app(engine, made, Metrics("tiny"), dashboard_router(engine))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
