"""The API's description: examples of every body and of the answers, each valid for its own model."""

from __future__ import annotations

import time
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, SecretStr

from coordinator import routes_link, routes_model, routes_people, routes_round, routes_worker
from coordinator.examples import ANSWERS, EXAMPLES, PROBLEM
from coordinator.gateway import GatewayDeps, create_app
from coordinator.ledger import Ledger
from rankup import errors
from rankup.settings import CoordinatorSettings
from rankup.store import MemoryStore

ROUTES = [
    route
    for module in (routes_link, routes_model, routes_people, routes_round, routes_worker)
    for route in module.router.routes
]


async def no_ledger() -> Ledger:
    raise errors.UnreachableError("there is none")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    settings = CoordinatorSettings(organiser_token=SecretStr("x"))
    return create_app(GatewayDeps(no_ledger, MemoryStore(), settings, "d7" * 32, time.time))


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> dict[tuple[str, str], dict[str, Any]]:
    paths = app.openapi()["paths"]
    return {(path, method): told for path, methods in paths.items() for method, told in methods.items()}


def test_every_body_has_an_example(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    with_body = {where: told["requestBody"] for where, told in operations.items() if "requestBody" in told}
    assert {path for path, _ in with_body} == set(EXAMPLES)
    for (path, _), body in with_body.items():
        example = body["content"]["application/json"]["example"]
        assert type(EXAMPLES[path]).model_validate(example) == EXAMPLES[path]


def test_every_example_of_a_body_is_one_of_the_model_that_the_route_takes() -> None:
    taken = {route.path: route.body_field.field_info.annotation for route in ROUTES if route.body_field is not None}
    assert {path: type(body) for path, body in EXAMPLES.items()} == taken


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_example_of_an_answer_is_valid_and_says_something_in_every_field(name: str) -> None:
    models: dict[str, type[BaseModel]] = {
        route.response_model.__name__: route.response_model for route in ROUTES if route.response_model is not None
    }
    answer = models[name].model_validate(ANSWERS[name])
    assert answer.model_dump(mode="json", exclude_none=True) == ANSWERS[name]


def test_every_answer_with_a_model_shows_its_example(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    for where, told in operations.items():
        for status, response in told["responses"].items():
            content = response.get("content", {}).get("application/json", {})
            if status.startswith("2") and "$ref" in content.get("schema", {}):
                assert content["example"] == ANSWERS[content["schema"]["$ref"].rpartition("/")[2]], where


def test_the_example_of_a_problem_has_a_code_of_the_error_tree(app: FastAPI) -> None:
    shown = app.openapi()["components"]["schemas"]["Problem"]["examples"][0]
    assert type(PROBLEM).model_validate(shown) == PROBLEM
    assert PROBLEM.type.rpartition("/")[2] == errors.StateError.code
    assert PROBLEM.status == errors.StateError.http_status
