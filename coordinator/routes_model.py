"""Routes of readers: the server, models, versions, blobs and datasets. They need no token.

What always holds:
- only objects under `blobs/` can be fetched by digest: uploads, held-out rows and records stay inside;
- a sealed manifest is served as the bytes that were signed, with their hash as its etag.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import RedirectResponse, Response

import rankup
from coordinator.access import DeskOf
from coordinator.blobs import FOR_GOOD, blob_answer
from coordinator.openapi import refusals
from rankup.errors import NotFoundError, UnreachableError
from rankup.message import Answer, Digest, Identifier
from rankup.protocol import PROTOCOL_VERSION, Pointer, ServerInfo, VersionView
from rankup.records import DatasetCard, Retained
from rankup.retained import MAX_RETAINED_BYTES, parse_retained
from rankup.store import blob_key
from rankup.versions import retained_key

READY_TIMEOUT_S = 5.0
MAX_VERSIONS = 1000

ModelName = Annotated[Identifier, Path(description="From the list of models.")]
VersionNumber = Annotated[int, Path(ge=0, le=999_999)]

router = APIRouter(prefix="/v1", tags=["reader"])


class Health(Answer):
    status: str = "ok"


class Models(Answer):
    models: tuple[str, ...]


class Versions(Answer):
    versions: tuple[VersionView, ...]


class Datasets(Answer):
    datasets: tuple[DatasetCard, ...]


@router.get("/info", responses=refusals())
async def info(desk: DeskOf) -> ServerInfo:
    """What this server is and which key signs its versions."""
    return ServerInfo(
        protocol=PROTOCOL_VERSION,
        server_version=rankup.__version__,
        publisher_key=desk.publisher_key,
        models=await desk.in_thread(desk.catalogue.models),
        invite_needed=desk.settings.enrolment == "invite",
        max_delta_bytes=desk.settings.max_delta_bytes,
    )


@router.get("/health")
async def health() -> Health:
    """The process answers; says nothing about the servers behind it."""
    return Health()


@router.get("/ready", responses=refusals())
async def ready(desk: DeskOf) -> Health:
    """The ledger and object storage answer too."""

    async def check_ledger() -> None:
        await (await desk.ledger()).ping()

    async def check_store() -> None:
        await desk.in_thread(desk.catalogue.has_blob, "0" * 64)

    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await asyncio.gather(check_ledger(), check_store())
    except TimeoutError as exc:
        raise UnreachableError(f"ledger or object storage took longer than {READY_TIMEOUT_S:g} s") from exc
    return Health()


@router.get("/models", responses=refusals())
async def list_models(desk: DeskOf) -> Models:
    """Models with at least one published version."""
    return Models(models=await desk.in_thread(desk.catalogue.models))


@router.get("/models/{model}/latest", responses=refusals(404))
async def latest(model: ModelName, desk: DeskOf) -> Pointer:
    """Which version is the latest."""
    return await desk.in_thread(desk.catalogue.pointer, model)


@router.get("/models/{model}/versions", responses=refusals(404))
async def list_versions(
    model: ModelName, desk: DeskOf, limit: Annotated[int, Query(ge=1, le=MAX_VERSIONS)] = 200
) -> Versions:
    """Published versions, newest first."""
    return Versions(versions=await desk.in_thread(desk.catalogue.versions, model, limit=limit))


@router.head("/models/{model}/versions/{version}", include_in_schema=False)
@router.get(
    "/models/{model}/versions/{version}",
    response_class=Response,
    responses={
        200: {"description": "The DSSE envelope as it was stored.", "content": {"application/json": {}}},
        304: {"description": "The reader has these bytes already."},
        **refusals(404),
    },
)
async def show_version(
    model: ModelName,
    version: VersionNumber,
    desk: DeskOf,
    if_none_match: Annotated[str | None, Header(max_length=4096)] = None,
) -> Response:
    """The sealed manifest of a version: check its signature with the publisher's key."""
    sealed = await desk.in_thread(desk.catalogue.envelope, model, version)
    headers = {"ETag": f'"{sealed.sha256}"', "Cache-Control": FOR_GOOD}
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    if headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(sealed.data, media_type="application/json", headers=headers)


@router.get("/models/{model}/retained", responses=refusals(404))
async def show_retained(model: ModelName, desk: DeskOf) -> Retained:
    """Which parts of which versions are no longer kept: a hint for planning a download, not signed."""

    def read() -> Retained:
        try:
            data = desk.store.get(retained_key(model), max_bytes=MAX_RETAINED_BYTES)
        except NotFoundError:
            desk.catalogue.pointer(model)  # tells an unknown model from one of which everything is kept
            return Retained(model=model)
        return parse_retained(data, model=model)

    return await desk.in_thread(read)


@router.head("/blobs/{sha256}", include_in_schema=False)
@router.get(
    "/blobs/{sha256}",
    status_code=307,
    response_class=Response,
    responses={
        200: {"description": "The bytes, from a server that hands them out itself."},
        206: {"description": "The range of them that was asked for."},
        307: {"description": "Where the bytes can be fetched for a while, with Range."},
        **refusals(404, 416),
    },
)
async def blob(sha256: Annotated[Digest, Path()], request: Request, desk: DeskOf) -> Response:
    """Bytes by their sha256."""
    key = blob_key(sha256)
    info = await desk.in_thread(desk.store.head, key)
    if info is None:
        raise NotFoundError(f"There is no blob {sha256}.", remedy="Take digests from a manifest of this server.")
    if desk.settings.transfer == "proxied":
        return blob_answer(
            desk.store,
            key,
            desk.outgoing,
            size_bytes=info.size_bytes,
            sha256=sha256,
            method=request.method,
            asked=request.headers,
        )
    return RedirectResponse(await desk.in_thread(desk.store.presign_get, key), status_code=307)


@router.get("/datasets", responses=refusals())
async def list_datasets(desk: DeskOf) -> Datasets:
    """Cards of the datasets that rounds can be opened on."""
    return Datasets(datasets=await desk.in_thread(desk.catalogue.datasets))
