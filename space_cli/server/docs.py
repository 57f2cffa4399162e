"""The server's endpoints, its OpenAPI description, and a self-contained page, both made from the endpoints."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from space_cli import __version__


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the server does for a method and a path.

    Attributes:
        path: as Starlette writes it; `{name:path}` is a parameter.
        handler: answers a request.
        summary: a line for the documentation.
        body: of a request.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    body: type[BaseModel] | None = None

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r"{(\w+):\w+}", r"{\1}", self.path)


def openapi(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI description."""
    endpoints = list(endpoints)
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    refs, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operation: dict[str, Any] = {"summary": endpoint.summary, "responses": {"200": {"description": "Done."}}}
        if endpoint.body is not None:
            schema = refs[(endpoint.body, "validation")]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if names := re.findall(r"{(\w+)}", endpoint.template):
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        paths.setdefault(endpoint.template, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "space", "version": __version__, "summary": "OpenAI's interface, drafts verified."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def page(endpoints: Iterable[Endpoint]) -> str:
    """Return the page."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>space serve</title>"]
    parts.append("<style>body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}</style>")
    parts.append(f"<h1>space serve {escape(__version__)}</h1>")
    for endpoint in endpoints:
        heading = f"{endpoint.method} {escape(endpoint.template)}"
        parts.append(f"<h2><code>{heading}</code></h2><p>{escape(endpoint.summary)}")
        if endpoint.body is not None:
            fields = endpoint.body.model_json_schema()["properties"]
            parts.append("<p>Fields: " + ", ".join(f"<code>{escape(name)}</code>" for name in fields) + ".")
    return "".join(parts) + "</html>"
