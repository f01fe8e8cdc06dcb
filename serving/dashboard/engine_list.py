"""The engines of a server by name: one, or the workers of a pool."""

from typing import NamedTuple

from dispec.engine.process.messages import Role
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.client.request_stream import RequestStream
from dispec.serving.cluster.request_migration import MigratedStream
from dispec.serving.cluster.worker_pool import WorkerPool


class NamedEngine(NamedTuple):
    """An engine. role: of a worker of a pool."""

    name: str
    client: EngineClient
    role: Role | None = None


def engines_of(client: EngineClient) -> list[NamedEngine]:
    """Return the engines behind a client."""
    if not isinstance(client, WorkerPool):
        return [NamedEngine("engine", client)]
    return [NamedEngine(f"{one.role} {one.number}", one.client, one.role) for one in client.workers]


def engine_name(client: EngineClient, stream: RequestStream) -> str | None:
    """Return the worker that serves a request or did last; None without a pool, and for a worker that is gone."""
    if not isinstance(stream, MigratedStream):
        return None
    return next((one.name for one in engines_of(client) if one.client is stream.engine), None)
