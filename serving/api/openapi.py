"""The OpenAPI document. Litestar makes the document and its page, and msgspec the schemas of bodies.

The page's script and style come from an installed package, so that it works without a network.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Litestar, Response, get
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin, SwaggerRenderPlugin
from litestar.openapi.spec import Components, Operation, SecurityScheme, Tag
from litestar.params import FromPath
from litestar.response import Redirect

from dispec.serving.api.openapi_schemas import (
    EXAMPLES,
    RequestMessage,
    ResponseFunctionTool,
    ResponseInputItem,
    complete_schemas,
)
from dispec.serving.http.errors import ApiError, ErrorBody
from dispec.serving.http.web_assets import INSTALL, SWAGGER_FILES, swagger_directory

_REFERENCE = "#/components/schemas/{name}"
_TAGS = {
    "Generation": "Answers and continuations.",
    "Responses": "Answers as items, which the server keeps, and conversations that go on from them.",
    "Models": "What is served, and with which options.",
    "Tokenizer": "Texts to token ids, and back.",
    "Monitoring": "How the server is doing.",
}
_PARTS = (RequestMessage, ResponseInputItem, ResponseFunctionTool)  # to which schemas of bodies refer
_known: dict[str, type] = {}


def describe(
    request: type | None,
    response: type | None,
    *,
    tag: str,
    streams: bool = False,
    error: type = ErrorBody,
    media_type: str = "application/json",
    needs_key: bool = True,
) -> dict[str, Any]:
    """Return the arguments of a Litestar route for the document: its tag, and the types of its bodies."""
    for form in (request, response, error):
        if form is not None:
            _known[form.__name__] = form
    assert tag in _TAGS

    class Described(Operation):
        def to_schema(self) -> dict[str, Any]:
            found = super().to_schema()
            if request is not None:
                examples = EXAMPLES[request.__name__]
                body = _json(request)
                body["application/json"]["examples"] = {name: {"value": value} for name, value in examples.items()}
                found["requestBody"] = {"required": True, "content": body}
            kind = "object" if media_type == "application/json" else "string"
            content = {media_type: {"schema": {"type": kind}}} if response is None else _json(response)
            if streams:
                content["text/event-stream"] = {"schema": {"type": "string"}}
            found["responses"] = {
                "200": {"description": "The answer.", "content": content},
                "default": {"description": "What went wrong.", "content": _json(error)},
            }
            if not needs_key:
                found["security"] = []
            return found

    return {"operation_class": Described, "tags": [tag]}


def openapi_config(version: str, needs_key: bool) -> OpenAPIConfig:
    """Return Litestar's configuration of the document."""
    plugins: list[OpenAPIRenderPlugin] = [JsonRenderPlugin(path="/openapi.json")]
    if swagger_directory() is not None:
        page = SwaggerRenderPlugin(
            path="/",
            js_url="/schema/assets/swagger-ui-bundle.js",
            css_url="/schema/assets/swagger-ui.css",
            standalone_preset_js_url="/schema/assets/swagger-ui-standalone-preset.js",
            favicon="",
        )
        plugins.insert(0, page)
    bearer = SecurityScheme(type="http", scheme="bearer", description="One of the keys of --api-key.")
    return OpenAPIConfig(
        title="DiSpec",
        version=version,
        description="An OpenAI-compatible server. Fields of OpenAI's API that are not listed are refused by name. Null"
        " is as good as leaving a field out. HEAD works wherever GET does.",
        tags=[Tag(name, description) for name, description in _TAGS.items()],
        path="/schema",
        use_handler_docstrings=True,
        render_plugins=plugins,
        components=Components(security_schemes={"key": bearer}),
        security=[{"key": []}] if needs_key else None,
    )


def add_schemas(app: Litestar, model_names: Sequence[str], slo_names: Sequence[str] = ()) -> None:
    """Add the schemas of bodies to the document of an application with all its routes."""
    _, found = msgspec.json.schema_components([*_known.values(), *_PARTS], ref_template=_REFERENCE)
    complete_schemas(found, list(model_names), list(slo_names))
    app.openapi_schema.components.schemas.update(found)


@get("/schema/assets/{name:str}", include_in_schema=False, sync_to_thread=True)
def schema_asset(name: FromPath[str]) -> Response[bytes]:
    """Return a file of the document's page."""
    directory = swagger_directory()
    if directory is None or name not in SWAGGER_FILES:
        raise NotFoundException
    return Response((directory / name).read_bytes(), media_type=SWAGGER_FILES[name])


@get("/docs", include_in_schema=False, sync_to_thread=False)
def docs() -> Redirect:
    """Redirect to the document's page."""
    if swagger_directory() is None:
        raise ApiError(404, f"/docs needs Swagger UI: {INSTALL}; the document is at /schema/openapi.json")
    return Redirect("/schema")


@get("/openapi.json", include_in_schema=False, sync_to_thread=False)
def openapi_json() -> Redirect:
    """Redirect to the document."""
    return Redirect("/schema/openapi.json")


def _json(form: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(name=form.__name__)}}}
