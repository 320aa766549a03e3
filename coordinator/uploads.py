"""Uploads in parts: what of a delta is there, where the rest goes, and the end of it, when all is there.

What always holds:
- no state but object storage's: the upload is found again by its key, which is the lease and the delta's sha256, so any
  replica goes on with what another one began, after any time;
- an address takes one part, of the length that `rankup.parts` gives it and the sha256 that the worker has named, so a
  worker can spoil nobody's upload but its own; and what is put together is hashed again by admission, as a whole;
- asking again changes nothing that is there. Who asks at the same time goes on with the same upload, the older one;
- a lease has parts of one delta: with the first question about another one, those of the one before go;
- parts that do not fit together are thrown away, and the worker begins again.

An upload that nobody goes on with is ended by `rankup admin gc`, or by a rule of the bucket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import structlog

from coordinator.tickets import TICKET_TTL_S, Piece, Ticket, TicketSigner
from rankup.errors import BusyError, InputError, NotFoundError
from rankup.multipart import ArrivedPart, OpenUpload
from rankup.parts import Part, cut
from rankup.protocol import PartTicket, UploadRequest, UploadTicket
from rankup.store import Store
from rankup.versions import upload_key

PARTS_A_TICKET: Final = 32
"""Addresses in one answer: as many as a slow line takes within their time."""
RETRY_AFTER_S: Final = 1.0

log = structlog.get_logger(__name__)


def ticket_in_parts(
    store: Store, lease_id: str, request: UploadRequest, *, signer: TicketSigner | None, now: float
) -> UploadTicket:
    """What is still to be sent of the delta that `request` names by its parts; with nothing missing, put it together.

    `signer`: the gateway's own addresses; None: those of object storage. `now` is Unix seconds. Calls of the store
    block.

    Raises:
        BusyError: the upload ended while it was looked at, or its parts do not fit: ask again.
    """
    key = upload_key(lease_id, request.sha256)
    uploads = _open(store, key)
    upload_id = uploads[0].upload_id if uploads else _begin(store, key)
    try:
        arrived = store.arrived_parts(key, upload_id) if uploads else ()
        wanted = list(zip(cut(request.size_bytes), request.parts, strict=True))
        there = {part.number: part for part in arrived if _fits(part, *wanted[min(part.number, len(wanted)) - 1])}
        missing = [(part, digest) for part, digest in wanted if part.number not in there]
        if not missing:
            _finish(store, key, uploads, [replace(there[part.number], sha256=digest) for part, digest in wanted])
            return UploadTicket(url="", headers={}, expires_at=now, already_there=True, there_bytes=request.size_bytes)
    except NotFoundError as exc:
        raise BusyError("the upload has just ended", retry_after_s=RETRY_AFTER_S) from exc
    granted, expires_at = [], now + TICKET_TTL_S
    for part, digest in missing[:PARTS_A_TICKET]:
        if signer is not None:
            piece = Piece(request.sha256, upload_id, part.number)
            address = signer.address(Ticket(lease_id, digest, part.size_bytes, int(expires_at), piece))
            headers = {"Content-Length": str(part.size_bytes)}
        else:
            put = store.presign_part(key, upload_id, part.number, size_bytes=part.size_bytes, sha256=digest)
            address, headers, expires_at = put.url, put.headers, put.expires_at
        granted.append(PartTicket(number=part.number, url=address, headers=headers))
    there_bytes = request.size_bytes - sum(part.size_bytes for part, _ in missing)
    return UploadTicket(url="", headers={}, expires_at=expires_at, parts=tuple(granted), there_bytes=there_bytes)


def _open(store: Store, key: str) -> list[OpenUpload]:
    """The uploads to exactly this key, oldest first."""
    found = (upload for upload in store.open_uploads(key) if upload.key == key)
    return sorted(found, key=lambda upload: (upload.begun_at, upload.upload_id))


def _begin(store: Store, key: str) -> str:
    for other in store.open_uploads(f"{key.rpartition('/')[0]}/"):
        if other.key != key:
            store.abort_upload(other.key, other.upload_id)
    return store.begin_upload(key)


def _fits(arrived: ArrivedPart, part: Part, digest: str) -> bool:
    # Where the store does not tell a part's sha256, what was signed for it has to do until all are put together.
    same = (arrived.number, arrived.size_bytes) == (part.number, part.size_bytes)
    return same and arrived.sha256 in (None, digest)


def _finish(store: Store, key: str, uploads: list[OpenUpload], parts: list[ArrivedPart]) -> None:
    first, *others = uploads
    try:
        store.finish_upload(key, first.upload_id, parts)
    except NotFoundError:
        raise
    except InputError as exc:
        log.warning("parts_do_not_fit", key=key, cause=exc.cause)
        store.abort_upload(key, first.upload_id)
        raise BusyError("the parts do not fit together: they are sent again", retry_after_s=RETRY_AFTER_S) from exc
    for other in others:
        store.abort_upload(key, other.upload_id)
