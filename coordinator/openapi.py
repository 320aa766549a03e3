"""What `/v1/openapi.json` says beyond what the routes say: refusals as problems, and an example of each body.

The examples are real messages: every one of them is a valid model of `rankup.protocol`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import rankup
from rankup.message import Message
from rankup.problems import MEDIA_TYPE
from rankup.protocol import (
    DeviceProfile,
    EnrolRequest,
    EnrolStatement,
    Heartbeat,
    Problem,
    ReturnRequest,
    RoundRequest,
    SubmitRequest,
    SubmitStatement,
    UploadRequest,
)
from rankup.recipe import Recipe

_MEANING = {
    400: "The request is wrong in itself.",
    401: "No bearer token, or one that the server does not know.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    408: "The body stopped arriving.",
    409: "The thing is not in a state that allows this.",
    413: "Above a size limit; nothing of it was parsed.",
    416: "None of the bytes is in the range.",
    422: "A field does not fit the protocol; `errors` says which.",
    429: "Too much at once: come back after `retry_after_s`.",
    503: "A server behind the gateway does not answer: come back after `retry_after_s`.",
    507: "The server has no room for this at present.",
}
_ALWAYS = (413, 422, 429, 503)
_PROBLEM_REF = {"$ref": "#/components/schemas/Problem"}
_KEY, _DIGEST, _SIGNATURE = "d7" * 32, "3b" * 32, "9c" * 64

EXAMPLES: dict[str, Message] = {
    "/v1/workers": EnrolRequest(
        statement=EnrolStatement(
            public_key=_KEY,
            name="ada",
            invite="spring-round",
            device=DeviceProfile(kind="cuda", name="RTX 3060", memory_bytes=12 * 1024**3, threads=8),
            issued_at=1_767_225_600.0,
        ),
        signature=_SIGNATURE,
    ),
    "/v1/leases/{lease_id}/heartbeat": Heartbeat(fence=3, step=12, loss=2.93, tokens_per_s=410.0),
    "/v1/leases/{lease_id}/return": ReturnRequest(fence=3, reason="the machine is needed for a game"),
    "/v1/leases/{lease_id}/upload": UploadRequest(fence=3, sha256=_DIGEST, size_bytes=4_915_200),
    "/v1/leases/{lease_id}/submit": SubmitRequest(
        statement=SubmitStatement(
            round_id="tiny-r0001-9f3c2a",
            lease_id="l-4f2a9c1b7d3e5f60",
            fence=3,
            base_manifest=_DIGEST,
            sha256=_DIGEST,
            size_bytes=4_915_200,
            tokens=9_800,
            steps=25,
            first_loss=3.41,
            last_loss=2.93,
            seconds=61.5,
        ),
        signature=_SIGNATURE,
    ),
    "/v1/rounds": RoundRequest(model="tiny", dataset="pydocs", recipe=Recipe(rank=8, steps=25), shards=3, repeat=4),
}
"""Path of a POST -> a body for it."""


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
    for path, example in EXAMPLES.items():
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["example"] = example.model_dump(mode="json")
    return schema
