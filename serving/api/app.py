"""The application: its routes, the middleware around them, and the handler of errors."""

from collections.abc import Sequence
from typing import Protocol

from litestar import Litestar, Router, get
from litestar.datastructures import State
from litestar.response import Redirect
from litestar.types import ControllerRouterHandler

from dispec.serving.api import (
    openapi,
    routes_chat,
    routes_completions,
    routes_models,
    routes_monitoring,
    routes_tokenizer,
)
from dispec.serving.api.context import ApiContext, version
from dispec.serving.api.messages import routes as messages_routes
from dispec.serving.api.responses import routes as responses_routes
from dispec.serving.client.engine_client import EngineClient
from dispec.serving.http.auth import Keys
from dispec.serving.http.errors import handle_error
from dispec.serving.http.middleware import HeadMiddleware, Middleware
from dispec.serving.settings import ServerSettings


class MetricsRenderer(Protocol):
    """The metrics behind /metrics."""

    def render(self) -> bytes: ...


@get("/", include_in_schema=False, sync_to_thread=False)
def root() -> Redirect:
    """Redirect a browser to the dashboard."""
    return Redirect("/dashboard")


_ROUTES: list[ControllerRouterHandler] = [
    routes_chat.chat_completions,
    routes_completions.completions,
    routes_completions.generate,
    responses_routes.create_response,
    responses_routes.retrieve_response,
    responses_routes.cancel_response,
    responses_routes.delete_response,
    responses_routes.input_items,
    messages_routes.messages,
    messages_routes.count_tokens,
    routes_models.models,
    routes_models.model,
    routes_models.model_info,
    routes_models.server_info,
    routes_models.show_version,
    routes_tokenizer.tokenize,
    routes_tokenizer.detokenize,
    routes_tokenizer.tokenizer_info,
    routes_monitoring.health,
    routes_monitoring.live,
    routes_monitoring.load,
    routes_monitoring.stats,
    routes_monitoring.metrics,
    root,
    openapi.schema_asset,
    openapi.docs,
    openapi.openapi_json,
]


def create_app(
    client: EngineClient,
    settings: ServerSettings,
    metrics: MetricsRenderer,
    dashboard: Router | None = None,
    names: Sequence[str] = (),
) -> Litestar:
    """Return the ASGI application, which neither starts nor stops the client. `names` are the model's."""
    app = Litestar(
        route_handlers=[*_ROUTES, *([] if dashboard is None else [dashboard])],
        state=State({"context": ApiContext(client, settings, names), "metrics": metrics}),
        exception_handlers={Exception: handle_error},
        openapi_config=openapi.openapi_config(version(), bool(settings.api_key)),
        logging_config=None,
        request_max_body_size=None,  # `serving.api.request_body` reads all bodies, and limits them
    )
    openapi.add_schemas(app, names, [slo.name for slo in settings.slo])
    # Around the application, because Litestar's own middleware does not run for unknown routes.
    inner = HeadMiddleware(app.asgi_handler)
    app.asgi_handler = Middleware(inner, Keys(settings.api_key), settings.max_header_bytes, cors=settings.cors)
    return app
