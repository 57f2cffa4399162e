"""The documentation describes what is served: nothing more, nothing less."""

import re

import pytest
from starlette.testclient import TestClient

from space_cli.server.app import Limits, Server
from space_cli.server.guard import Access
from space_cli.server.shelf import Shelf


def load_nothing(name):
    raise AssertionError(name)


@pytest.fixture
def guard():
    return Server(Shelf(["nano"], load_nothing), Limits()).app(Access())


@pytest.fixture
def client(guard):
    with TestClient(guard, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def served(guard):
    """Each route that the application answers: method, and path as OpenAPI writes it."""
    routes = guard._app.routes
    return {(method, re.sub(r":\w+}", "}", route.path)) for route in routes for method in route.methods - {"HEAD"}}


def test_every_route_is_in_openapi(client, served):
    paths = client.get("/openapi.json").json()["paths"]

    described = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    assert described == served
    assert ("GET", "/docs") in served


def test_every_route_is_on_the_page(client, served):
    page = client.get("/docs").text

    assert {tuple(heading.split()) for heading in re.findall("<h2><code>(.*?)</code>", page)} == served


def test_parameters_and_bodies_are_described(client):
    description = client.get("/openapi.json").json()

    (parameter,) = description["paths"]["/v1/models/{name}"]["get"]["parameters"]
    assert parameter["name"] == "name"
    body = description["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].removeprefix("#/components/schemas/")
    assert {"prompt", "max_tokens"} <= set(description["components"]["schemas"][name]["properties"])
