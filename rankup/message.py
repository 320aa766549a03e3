"""What every message is made of: the two base classes, and the bounded words and numbers that their fields use.

What always holds: messages are frozen, digests are lower-case hex sha256 of the bytes they name, every word
has a bound.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Lower-case hex sha256."""
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""Names of models, rounds, datasets, leases and workers: safe in a URL, a file name and a key."""
DisplayName = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")
]
TeamName = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=48, pattern=r"^[^\x00-\x1f\x7f]*$")
]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,256}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Raw Ed25519 public key, 32 bytes, hex."""
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
"""Ed25519 signature, 64 bytes, hex."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]

DYADIC_LOG2: Final = 8


def _dyadic(value: float) -> float:
    if not (value * 2**DYADIC_LOG2).is_integer():
        raise ValueError(f"must be a multiple of 2^-{DYADIC_LOG2}, such as 0.5, 0.75 or 0.875")
    return value


Dyadic = Annotated[float, Field(ge=0, le=16), AfterValidator(_finite), AfterValidator(_dyadic)]
"""A factor that every floating-point format holds exactly: a multiple of 1/256 of at most 16."""


class Message(BaseModel):
    """Something a client sends, or that is stored and signed: frozen, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(BaseModel):
    """Something the server sends: frozen, unknown fields are ignored by older clients."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def canonical_json(message: BaseModel) -> bytes:
    """The one byte string for a message: UTF-8 JSON, fields sorted, no spaces, no NaN. Equal messages, equal bytes."""
    data = message.model_dump(mode="json")
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
