"""The events of the dashboard: once a second, the changes for each open page."""

import asyncio
import os.path
from collections.abc import AsyncIterator
from typing import Any

import psutil

from dispec.serving.client.engine_client import EngineClient
from dispec.serving.dashboard.dashboard_state import DashboardState
from dispec.serving.dashboard.engine_usage import EngineUsage, pool_of

INTERVAL = 1.0  # seconds


async def dashboard_events(
    client: EngineClient, state: DashboardState, usage: EngineUsage, range_name: str
) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of one page, until the engine is dead or a server that shuts down has no requests left."""
    for view in state.views(range_name):
        server, is_idle, engines = _server_state(client), not client.load, usage.rows(state.num_steps)
        yield view | server | {"engines": engines, "pool": pool_of(engines), "machine": _machine()}
        if server["state"] == "dead" or (server["state"] == "draining" and is_idle):
            return
        await asyncio.sleep(INTERVAL)


def _server_state(client: EngineClient) -> dict[str, Any]:
    """Return the state and its reason: why requests make no progress, or why the engine died."""
    is_ready, why = client.is_ready()
    is_stalled = client.state == "ready" and not is_ready
    has_died = client.state in ("restarting", "dead") and client.last_death is not None
    info = client.info
    return {
        "state": "stalled" if is_stalled else client.state,
        "reason": why if is_stalled else str(client.last_death) if has_died else "",
        "running": client.num_running,
        "waiting": client.num_waiting,
        "kv_usage": client.kv_usage,
        "info": None
        if info is None
        else {
            "model": os.path.basename(info.model) if os.path.isabs(info.model) else info.model,
            "device": info.device,
            "dtype": info.dtype,
            "weights_format": info.weights_format,
            "max_model_len": info.max_model_len,
            "block_size": info.block_size,
            "num_blocks": info.num_blocks,
        },
    }


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"cores": psutil.cpu_count(), "memory_used": memory.total - memory.available, "memory_total": memory.total}
