"""The server's life: it listens, starts the engine, serves, and drains on a signal."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from litestar.types import ASGIApp

from dispec.engine.process.messages import EngineInfo
from dispec.serving.api.app import create_app
from dispec.serving.api.context import ApiContext, version
from dispec.serving.client.engine_client import EngineClient, EngineObserver, State
from dispec.serving.client.engine_supervisor import RestartPolicy
from dispec.serving.client.process_client import ProcessClient
from dispec.serving.cluster.autoscaler import Autoscaler
from dispec.serving.cluster.worker_metrics import WorkerMetrics
from dispec.serving.cluster.worker_pool import WorkerPool
from dispec.serving.dashboard.routes_dashboard import dashboard_router
from dispec.serving.http.acceptor import Acceptor, raise_file_limit
from dispec.serving.http.http_protocol import BoundedHttp
from dispec.serving.http.web_assets import INSTALL, missing_pages
from dispec.serving.observability.metrics import Metrics
from dispec.serving.observability.structured_log import logging_to
from dispec.serving.service_manager import feed_watchdog, notify
from dispec.serving.settings import ServerSettings
from dispec.serving.start_check import check_start

log = logging.getLogger("dispec.server")

_BACKLOG = 4096
_KEEP_ALIVE_SECONDS = 75  # longer than those of clients and proxies, which then close idle connections first
_NUM_THREADS = 4  # that tokenize; more would take cores from the engine
_FEW_FILES = 1024  # a lower limit of open files gets a warning
_OPEN_FILES, _OPEN_FILES_PER_ENGINE = 32, 32  # an idle server with one engine has 26 open
_SHUTDOWN_SECONDS = 3  # for responses that are still written after draining; open dashboards never end


def run(settings: ServerSettings, engine_options: dict[str, Any], *, quiet: bool, show_progress: bool) -> int:
    """Serve in this process until a signal; return the exit code. Raises ValueError for bad options, and as `serve`."""
    check_start(settings, engine_options)

    def print_line(line: str) -> None:
        if not quiet or line.startswith("warning: "):
            print(line, flush=True)

    with logging_to(sys.stderr, settings.log_format, logging.WARNING if quiet else logging.INFO):
        return uvloop.run(serve(settings, engine_options, print_line, show_progress))


async def serve(
    settings: ServerSettings,
    engine_options: dict[str, Any],
    print_line: Callable[[str], None],
    show_progress: bool = False,
) -> int:
    """Serve until a signal; return the exit code. `print_line` gets the lines of the welcome.

    Raises ValueError for an address that is taken or too few open files, EngineDied if the engine cannot start.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_NUM_THREADS, "worker"))
    file_limit = raise_file_limit()
    _check_file_limit(file_limit, settings)
    listener = listen(settings.host, settings.port)
    with listener:
        client = make_client(settings, engine_options, show_progress)
        names = settings.served_model_name or (model_name(str(engine_options["model"])),)
        metrics = Metrics(names[0], settings.role, version())
        metrics.attach(client)
        if isinstance(client, WorkerPool):
            WorkerMetrics(client, metrics)
        app = create_app(client, settings, metrics, dashboard_router(client), names=names)
        server = DrainingServer(app, settings, client, file_limit)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        starting = asyncio.create_task(_start(client, app.state["context"]))
        watchdog = asyncio.create_task(feed_watchdog())
        scaling: asyncio.Task[None] | None = None
        try:
            await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                info = await starting  # raises the engine's error
                client.observers.append(watch := _ExitWithoutEngine(server))
                watch.on_state(client.state)
                for line in _welcome(info, settings, names[0], listener):
                    print_line(line)
                notify("READY=1", f"STATUS=serving {names[0]}")
                if settings.autoscale is not None and isinstance(client, WorkerPool):
                    scaling = asyncio.create_task(Autoscaler(client, settings.autoscale).run())
            await serving
        finally:
            starting.cancel()
            watchdog.cancel()
            if scaling is not None:
                scaling.cancel()
            server.should_exit = server.force_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await client.stop()
            await serving
    return server.exit_code


def make_client(settings: ServerSettings, engine_options: dict[str, Any], show_progress: bool) -> EngineClient:
    """Return the client of one engine, or of several with `--disaggregate`."""
    limits: dict[str, Any] = {
        "max_queued_requests": settings.max_queued_requests,
        "max_queued_tokens": settings.max_queued_tokens,
        "stall_seconds": settings.stall_seconds,
        "show_progress": show_progress,
        "has_slos": bool(settings.slo),
        "restarts": RestartPolicy(settings.max_engine_restarts),
    }
    if settings.disaggregate:
        return WorkerPool(
            engine_options,
            num_prefill=settings.num_prefill_workers,
            num_decode=settings.num_decode_workers,
            **limits,
        )
    if settings.role != "both":
        engine_options = {"kv_transfer": "auto"} | engine_options
    return ProcessClient(engine_options, **limits)


async def _start(client: EngineClient, context: ApiContext) -> EngineInfo:
    info = await client.start()
    await asyncio.to_thread(context.model)  # reads the vocabulary before the first request
    return info


class DrainingServer(uvicorn.Server):
    """Finishes running requests on SIGTERM or Ctrl-C, and refuses new ones. A second signal ends it at once."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, client: EngineClient, file_limit: int) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttp.with_limit(settings.max_header_bytes),
            ws="none",
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            backlog=_BACKLOG,
            access_log=False,
            log_config=None,
            server_header=False,
        )
        super().__init__(config)
        self.exit_code = 0
        self._client = client
        self._file_limit = file_limit
        self._drain_timeout = settings.drain_timeout
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, with our own acceptor of connections."""
        await super().startup(sockets=[])
        for listener in sockets or ():
            acceptor = Acceptor(listener, self._protocol, self._file_limit)
            self.servers.append(acceptor)  # type: ignore[arg-type]

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop, and exit with our own code: uvicorn raises the signal again at the end."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._take_signal, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _take_signal(self, number: signal.Signals) -> None:
        if self._client.state == "loading":
            self.should_exit = True
        elif self._draining is None:
            log.info("%s: finishing %d requests, taking no new ones", number.name, self._client.load)
            notify("STOPPING=1", f"STATUS=finishing {self._client.load} requests")
            self._draining = asyncio.create_task(self._drain())
        else:
            log.warning("%s again: leaving at once", number.name)
            self.exit_code = 128 + number
            self.force_exit = self.should_exit = True

    def exit_with_error(self) -> None:
        """Exit with code 1, unless the server is draining."""
        if self._draining is None and not self.should_exit:
            log.error("no engine is left: the server ends")
            self.exit_code = 1
            self.should_exit = True

    async def _drain(self) -> None:
        try:
            if not await self._client.drain(self._drain_timeout):
                log.warning("some requests were aborted: drain_timeout (%g s) has passed", self._drain_timeout)
        finally:
            self.should_exit = True


class _ExitWithoutEngine(EngineObserver):
    """Ends a server without engines, so that its supervisor can start it again."""

    def __init__(self, server: DrainingServer) -> None:
        self._server = server

    def on_state(self, state: State) -> None:
        if state == "dead":
            self._server.exit_with_error()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at one address. Raises ValueError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"host is {host!r}, which is no address of this machine") from None
    # Of the two addresses of "localhost", all clients try the IPv4 one.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    # asyncio sets TCP_NODELAY only if the protocol is named; without it a packet waits up to 40 ms for more data.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"cannot listen on {host} port {port} ({why}): choose another --host or --port") from error


def model_name(model: str) -> str:
    """Return a model's default name: a hub id, or the name of a directory or file."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else model


def _check_file_limit(limit: int, settings: ServerSettings) -> None:
    """Warn if few connections can be open. Raises ValueError if none can."""
    num_engines = 1
    if settings.disaggregate:
        bounds = settings.autoscale
        num_engines = settings.num_prefill_workers + settings.num_decode_workers if bounds is None else 2 * bounds.most
    fewest = _OPEN_FILES + _OPEN_FILES_PER_ENGINE * num_engines
    if limit < fewest:
        raise ValueError(f"this process may open {limit} files, must be at least {fewest}: raise `ulimit -n`")
    if limit < _FEW_FILES:
        log.warning("this process may open %d files, and each connection is one: raise `ulimit -n`", limit)


def _welcome(info: EngineInfo, settings: ServerSettings, name: str, listener: socket.socket) -> Iterator[str]:
    address, port = listener.getsockname()[:2]
    is_open = not address.startswith("127.") and address != "::1"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    url = f"http://{host}:{port}"
    seconds = ", ".join(f"{phase} {took:.1f} s" for phase, took in info.phase_seconds.items())
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_key else ""
    message = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    yield f"DiSpec {version()} serves {name} on {info.device}, listening on {address} port {port}"
    yield f"  weights    {info.weights_format}"
    yield f"  start      {seconds}"
    yield f"  API        {url}/v1"
    yield f"  dashboard  {url}/dashboard"
    if pages := missing_pages():
        yield f"  {INSTALL} adds {pages}"
    else:
        yield f"  docs       {url}/docs"
    yield f"  try        curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{message}'"
    if is_open and not settings.api_key:
        yield f"warning: every client that reaches {address} can use this server: set --api-key, or leave --host out"
