"""The application: routes, the gate that every request passes, and one shape for every error."""

from collections.abc import Sequence
from typing import Protocol

from litestar import Litestar, Router, get
from litestar.datastructures import State
from litestar.response import Redirect
from litestar.types import ControllerRouterHandler

from dispec.serving.api import openapi
from dispec.serving.api.routes_chat import chat_completions
from dispec.serving.api.routes_completions import completions, generate
from dispec.serving.api.routes_health import health, live, load, metrics, stats
from dispec.serving.api.routes_models import model, model_info, models, server_info, show_version, tokenizer_info
from dispec.serving.api.routes_tokenize import detokenize, tokenize
from dispec.serving.api.service import ApiContext, version
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.http.auth import Keys
from dispec.serving.http.errors import answer_error
from dispec.serving.http.head import HeadAsGet
from dispec.serving.http.middleware import Middleware
from dispec.serving.settings import ServerSettings


class Rendering(Protocol):
    """What /metrics shows."""

    def render(self) -> bytes: ...


@get("/", include_in_schema=False, sync_to_thread=False)
def root() -> Redirect:
    """A person with a browser."""
    return Redirect("/dashboard")


_ROUTES: list[ControllerRouterHandler] = [
    chat_completions,
    completions,
    generate,
    models,
    model,
    tokenize,
    detokenize,
    tokenizer_info,
    model_info,
    server_info,
    show_version,
    health,
    live,
    load,
    stats,
    metrics,
    root,
    openapi.schema_asset,
    openapi.docs,
    openapi.openapi_json,
]


def create_app(
    client: EngineClient,
    settings: ServerSettings,
    metrics: Rendering,
    dashboard: Router | None = None,
    names: Sequence[str] = (),
) -> Litestar:
    """The ASGI application. It neither starts nor stops the client. `names` are the model's for clients."""
    app = Litestar(
        route_handlers=[*_ROUTES, *([] if dashboard is None else [dashboard])],
        state=State({"service": ApiContext(client, settings, names), "metrics": metrics}),
        exception_handlers={Exception: answer_error},
        openapi_config=openapi.openapi_config(version(), bool(settings.api_key)),
        logging_config=None,
        request_max_body_size=None,  # `serving.http.body` limits what it reads, and nothing else reads any
    )
    openapi.add_schemas(app, names, [slo.name for slo in settings.slo])
    # Not as Litestar's own middleware, which requests to unknown routes do not pass.
    inner = HeadAsGet(app.asgi_handler)
    app.asgi_handler = Middleware(inner, Keys(settings.api_key), settings.max_header_bytes, cors=settings.cors)
    return app
