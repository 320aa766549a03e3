"""What `/v1/openapi.json` says beyond what the routes say: refusals as problems, and examples of bodies and answers.

The examples stand in `examples`: every one of them is a valid message of the protocol.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import rankup
from coordinator.examples import ANSWERS, EXAMPLES, PROBLEM
from rankup.problems import MEDIA_TYPE
from rankup.protocol import Problem

_MEANING = {
    400: "The request is wrong in itself.",
    401: "No bearer token, or one that the server does not know.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    408: "The body stopped arriving.",
    409: "The thing is not in a state that allows this.",
    413: "Above a size limit; nothing of it was parsed.",
    415: "The body is not said to be JSON.",
    416: "None of the bytes is in the range.",
    422: "A field does not fit the protocol; `errors` says which.",
    429: "Too much at once: come back after `retry_after_s`.",
    503: "A server behind the gateway does not answer: come back after `retry_after_s`.",
    507: "The server has no room for this at present.",
}
_ALWAYS = (413, 422, 429, 503)
_PROBLEM_REF = {"$ref": "#/components/schemas/Problem"}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: these refusals and those that every route can give, as problems."""
    content = {MEDIA_TYPE: {"schema": _PROBLEM_REF}}
    return {status: {"description": _MEANING[status], "content": content} for status in sorted({*statuses, *_ALWAYS})}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` give the finished description; it is built once."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # the hook that FastAPI documents for this


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title="Rankup",
        version=rankup.__version__,
        description="One language model, fine-tuned together. Every refusal is a problem document (RFC 9457).",
        routes=app.routes,
    )
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas["Problem"]["examples"] = [PROBLEM.model_dump(mode="json", exclude_none=True)]
    for path, example in EXAMPLES.items():
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["example"] = example.model_dump(mode="json")
    for methods in schema["paths"].values():
        for operation in methods.values():
            if "requestBody" in operation:  # Any body can be something else than JSON, or stop half-way.
                unreadable = {str(status): said for status, said in refusals(400, 408, 415).items()}
                operation["responses"] = dict(sorted((unreadable | operation["responses"]).items()))
            _show_answer(operation["responses"])
    return schema


def _show_answer(responses: dict[str, Any]) -> None:
    """Put the example of its model beside each good answer that has one."""
    for status, response in responses.items():
        content = response.get("content", {}).get("application/json", {})
        model = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if status.startswith("2") and model in ANSWERS:
            content["example"] = ANSWERS[model]
