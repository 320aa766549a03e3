"""What leaves a volunteer's machine: every field of every message, every header, every file, and why.

What always holds: the list names each field that the messages of `rankup.protocol` have (a test compares them), so a
new field cannot leave unseen; reasons that go to the server are made by `public_reason`, without paths of this machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rankup import __version__

_REASON_LENGTH = 512
_PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?[/\\][^\s;:,'\"()]+")


@dataclass(frozen=True)
class Leaving:
    """One thing that is sent: when, what it is called there, what it says, and what for."""

    when: str
    name: str
    what: str
    why: str


_LOOK, _HELLO, _CLAIM, _WORK = "checking before joining", "joining", "asking for work", "during a lease"
_HANDOVER, _ALWAYS = "handing in", "every request"

LEAVING: tuple[Leaving, ...] = (
    Leaving(_ALWAYS, "network address", "as in any connection: the address that the server sees", "the internet"),
    Leaving(_ALWAYS, "User-Agent", f"rankup-worker/{__version__}; for base versions that of rankup", "old versions"),
    Leaving(_ALWAYS, "Authorization", "the token of this server; never sent along with bytes", "whose lease it is"),
    Leaving(_ALWAYS, "Host, Accept, Accept-Encoding, Connection, Content-Type, Content-Length, Range", "HTTP", "HTTP"),
    Leaving(_LOOK, "random bytes", "at most 1.1 MB of no meaning, once a day at most, not kept", "how fast uploads go"),
    Leaving(_LOOK, "model and round names", "which versions the open rounds train on", "what the work would take"),
    Leaving(_HELLO, "public_key", "a key made for this server only", "who signed a delta"),
    Leaving(_HELLO, "name", "--name, or volunteer- and six characters of the key", "the leaderboard; public"),
    Leaving(_HELLO, "team", "--team, if you name one", "the leaderboard; public"),
    Leaving(_HELLO, "invite", "--invite", "who may join"),
    Leaving(_HELLO, "kind", "cuda, mps, xpu or cpu", "the organiser's overview"),
    Leaving(_HELLO, "device name", "what the maker calls card or processor", "the organiser's overview"),
    Leaving(_HELLO, "memory_bytes", "memory of the card, or of the machine", "the organiser's overview"),
    Leaving(_HELLO, "threads", "threads that may be used", "the organiser's overview"),
    Leaving(_HELLO, "protocol", "version of the protocol", "old versions"),
    Leaving(_HELLO, "issued_at", "this machine's clock", "enrolments cannot be repeated later"),
    Leaving(_HELLO, "signature", "made with the private key, which stays here", "proof of the key"),
    Leaving(_CLAIM, "models", "--model, if you name any", "which round fits"),
    Leaving(_CLAIM, "memory_bytes", "free memory of the card, or of the machine, at that moment", "which round fits"),
    Leaving(_CLAIM, "available_s", "seconds until your hours end, if you set hours", "how many shards fit"),
    Leaving(_CLAIM, "delivering", "the lease whose delta is still being uploaded", "the next lease beside it"),
    Leaving(_WORK, "lease_id, fence", "which lease is meant; in every message about it", "two holders of one shard"),
    Leaving(_WORK, "voucher", "what the server gave with the lease, sent back when it has lost its data", "your work"),
    Leaving(_WORK, "step", "optimiser steps done, every few seconds, also while paused", "progress of the round"),
    Leaving(_WORK, "loss", "of the last step", "progress of the round"),
    Leaving(_WORK, "tokens_per_s", "of the last steps", "progress of the round"),
    Leaving(_WORK, "grad_norm", "length of the gradient of the last step", "progress of the round"),
    Leaving(_WORK, "energy_j", "joules that the card has used for the lease, if it tells", "what the round costs"),
    Leaving(_WORK, "reason", "why a lease goes back: one line, without paths of this machine", "the round's log"),
    Leaving(_WORK, "version and shard names", "which files are downloaded", "they must be asked for"),
    Leaving(_HANDOVER, "delta file", "numbers, trained on the shards that the server sent", "the contribution"),
    Leaving(_HANDOVER, "round_id, base_manifest", "what the delta belongs to; kept in the receipt", "the sum"),
    Leaving(_HANDOVER, "sha256, size_bytes", "of the delta; kept in the receipt", "the sum"),
    Leaving(_HANDOVER, "parts", "sha256 of each part of a large delta", "an upload that goes on where it stopped"),
    Leaving(_HANDOVER, "tokens, steps", "what was trained; kept in the receipt", "the weight in the sum"),
    Leaving(_HANDOVER, "first_loss, last_loss", "mean losses; kept in the receipt", "judging contributions"),
    Leaving(_HANDOVER, "seconds", "how long the training took; kept in the receipt", "the organiser's overview"),
    Leaving(_HANDOVER, "device", "cuda, mps, xpu or cpu; kept in the receipt", "judging contributions"),
    Leaving(_HANDOVER, "precision", "of the base in training, as nf4; kept in the receipt", "judging contributions"),
    Leaving(
        _HANDOVER,
        "tokens_per_s, grad_norm, energy_j",
        "speed, mean length of the gradient, joules; kept in the receipt",
        "what a version cost",
    ),
)

STAYING: tuple[str, ...] = (
    "files of yours: none is read but the worker's own folder, and what the graphics driver and Python need",
    "programs that run, the time since the last key, battery, temperature: read for the limits, never sent",
    "names of this machine and its users, its paths, its logs, its serial numbers",
    "the private key; limits.yaml; how many bytes were transferred; why you paused",
)


def public_reason(cause: str) -> str:
    """The first line of `cause` without this machine's paths, short enough for the server."""
    return _PATH.sub("(path)", cause.partition("\n")[0])[:_REASON_LENGTH]
