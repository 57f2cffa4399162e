"""The server's OpenAPI description, and a self-contained page made from it."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from space_cli import __version__
from space_cli.server.bodies import ChatRequest, CompletionRequest

_BODIES: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_PATHS = {
    "/v1/chat/completions": ("post", "Answer a conversation; with `stream`, as server-sent events."),
    "/v1/completions": ("post", "Continue a prompt, without a chat template."),
    "/v1/models": ("get", "The models that can be asked for."),
    "/v1/models/{name}": ("get", "One of them."),
    "/health": ("get", "Whether the server takes requests; needs no key."),
    "/metrics": ("get", "Figures in Prometheus' text form."),
    "/openapi.json": ("get", "This description for programs."),
}


@lru_cache(maxsize=1)
def openapi() -> dict[str, Any]:
    """Return the description."""
    refs, definitions = models_json_schema(
        [(body, "validation") for body in _BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for path, (method, description) in _PATHS.items():
        operation: dict[str, Any] = {"summary": description, "responses": {"200": {"description": "Done."}}}
        if path in _BODIES:
            schema = refs[(_BODIES[path], "validation")]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "space", "version": __version__, "summary": "OpenAI's interface, drafts verified."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


@lru_cache(maxsize=1)
def page() -> str:
    """Return the page."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>space serve</title>"]
    parts.append("<style>body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}</style>")
    parts.append(f"<h1>space serve {escape(__version__)}</h1>")
    for path, (method, description) in _PATHS.items():
        parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(description)}")
        if path in _BODIES:
            fields = _BODIES[path].model_json_schema()["properties"]
            parts.append("<p>Fields: " + ", ".join(f"<code>{escape(name)}</code>" for name in fields) + ".")
    return "".join(parts) + "</html>"
