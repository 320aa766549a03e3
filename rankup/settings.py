"""Typed settings, one model per room, read from the environment (`RANKUP_<ROOM>_<FIELD>`); units stand in the names.

Command-line options override the environment, the environment overrides the defaults. Secrets are `SecretStr`, so they
do not show up in logs or tracebacks. Settings that must reach another process (a Serve replica, the keeper, a Ray task)
travel as one JSON string made by `to_wire` and read by `from_wire`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from rankup.message import Identifier
from rankup.recipe import Precision

Reporter = Literal["tensorboard", "wandb", "trackio"]
"""Programs that show the numbers of a training."""


def state_home() -> Path:
    """Folder for everything that Rankup keeps on this machine: `$RANKUP_HOME` or the platform's user data folder."""
    from platformdirs import user_data_path

    override = os.environ.get("RANKUP_HOME")
    return Path(override).expanduser().resolve() if override else user_data_path("rankup")


class RoomSettings(BaseSettings):
    """Base of all settings: frozen, unknown names refused."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    def to_wire(self) -> str:
        """JSON with secrets in clear: only for the environment or the arguments of our own processes."""

        def reveal(value: Any) -> Any:
            return value.get_secret_value() if isinstance(value, SecretStr) else value

        return json.dumps({name: reveal(getattr(self, name)) for name in type(self).model_fields}, default=str)

    @classmethod
    def from_wire(cls, wire: str) -> Self:
        return cls(**json.loads(wire))


class StoreSettings(RoomSettings):
    """Object storage, S3 or compatible."""

    model_config = SettingsConfigDict(env_prefix="RANKUP_STORE_", frozen=True, extra="forbid")

    endpoint_url: str = ""
    """Empty: AWS."""
    public_endpoint_url: str = ""
    """The host in presigned URLs, as volunteers reach it; empty: `endpoint_url`."""
    bucket: str = "rankup"
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    presign_ttl_s: int = Field(default=3600, ge=1, le=604_800)


class LedgerSettings(RoomSettings):
    """Valkey or Redis: the live state."""

    model_config = SettingsConfigDict(env_prefix="RANKUP_LEDGER_", frozen=True, extra="forbid")

    url: SecretStr = SecretStr("")
    """`redis://…` or `unix:///path/valkey.sock`."""
    timeout_s: float = 5.0
    require_fsync: bool = True
    """WAITAOF before a submission is acknowledged; False only where the server has no append-only file."""


class CoordinatorSettings(RoomSettings):
    """Gateway and keeper."""

    model_config = SettingsConfigDict(env_prefix="RANKUP_COORDINATOR_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8420, ge=1, le=65535)
    enrolment: Literal["invite", "open", "approval"] = "invite"
    """Who may join: whoever has an invite; anybody; anybody, but without an invite no work before the organiser has
    approved."""
    invite: SecretStr = SecretStr("")
    """An invite without an end, beside those of `rankup people invite`; empty: there is none."""
    token_days: float = Field(default=90.0, gt=0)
    """How long a worker's token is good for; workers get the next one by themselves."""
    organiser_token: SecretStr = SecretStr("")
    """Bearer token of organiser calls; empty: there are none."""
    metrics_token: SecretStr = SecretStr("")
    """Bearer token that opens `/metrics` and nothing else; empty: only the organiser's does."""
    publisher_key_file: Path = Path("publisher.key")
    """Ed25519 private key, PEM, mode 600."""
    enrols_per_min: int = Field(default=60, ge=0)
    """Rate limits (`coordinator.ratelimit`), for each process of the gateway; 0: none. This one is for an address."""
    claims_per_min: int = Field(default=240, ge=0)
    """Of a worker."""
    heartbeats_per_min: int = Field(default=240, ge=0)
    """Of a worker."""
    deliveries_per_min: int = Field(default=480, ge=0)
    """Of a worker: its other calls about leases."""
    links_per_min: int = Field(default=30, ge=0)
    """Of an address: measurements of the way to the server, of at most 1 MiB each; a worker makes four a day."""
    requests_per_min: int = Field(default=6000, ge=0)
    """Of an address: everything else."""
    refusals_per_min: int = Field(default=300, ge=0)
    """Of an address: calls with a token that nobody knows."""
    trusted_proxies: tuple[str, ...] = ()
    """Networks, such as 10.0.0.0/8, of the proxies in front whose `X-Forwarded-For` says where a call came from."""
    max_body_bytes: int = 64 * 1024
    max_delta_bytes: int = 2 * 1024**3
    transfer: Literal["presigned", "proxied"] = "presigned"
    """How blobs and deltas travel: straight to and from object storage by presigned URLs, or through the gateway where
    volunteers cannot reach object storage."""
    spool_dir: Path | None = None
    """Where a delta lies while it arrives through the gateway; None: the system's folder for temporary files."""
    heartbeat_s: float = Field(default=15.0, gt=0)
    """How often a volunteer who trains reports, as long as they are few."""
    beats_per_s: float = Field(default=20.0, gt=0)
    """Heartbeats that all volunteers together may send: the more of them, the rarer each one's."""
    poll_s: float = Field(default=5.0, gt=0)
    """How soon a volunteer without work should ask again, as long as they are few."""
    polls_per_s: float = Field(default=20.0, gt=0)
    """Questions for work that all volunteers without any together may send."""
    replicas: int = Field(default=1, ge=1, le=256)
    """Processes that serve the gateway; rate limits count in each."""
    tick_s: float = Field(default=0.5, gt=0)
    """Pause between two looks of the keeper."""
    fold_group_bytes: int = 128 * 1024**2
    """Tensors are folded and stored in groups of about this size (float32)."""
    heldout_examples: int = Field(default=64, ge=1)
    """Held-out rows that the release gate scores."""
    screening_examples: int = Field(default=32, ge=1)
    """Held-out rows that each contribution of a cohort is scored on; every round draws others."""
    descent_examples: int = Field(default=192, ge=1)
    """Held-out rows whose gradient the cohort's contributions are compared with; every round draws others."""
    audits: bool = False
    """Train some shards again on the cluster, before their deltas are accepted: of a new volunteer every one, of a
    proven one ever fewer. An audit costs as much computing as the work that it checks."""


def _words(value: Any) -> Any:
    """A list, also where it is written as words with commas between them."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


class WorkerSettings(RoomSettings):
    """A volunteer's machine."""

    model_config = SettingsConfigDict(env_prefix="RANKUP_WORKER_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=lambda: state_home() / "worker")
    threads: int = Field(default=0, ge=0)
    """Threads of the trainer; 0: all cores."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`."""
    timeout_s: float = 30.0
    patience_s: float = 3 * 86_400.0
    """How long an unreachable server is waited for before the agent gives up (finished deltas stay in the outbox)."""
    cache_bytes: int = 50 * 1024**3
    """Most room for base versions; `disk_max_used_gb` of limits.yaml overrides it."""
    precision: Precision | Literal["auto"] = "auto"
    """What the frozen base is held in; auto: the best that fits (`worker.precision`)."""
    report_to: Annotated[tuple[Reporter, ...], NoDecode, BeforeValidator(_words)] = ()
    """Who else is told the numbers of each step, as `tensorboard,wandb`; their files lie under `runs/` of `home`."""
    checkpoint_every_s: float = Field(default=60.0, gt=0)
    """How often a training is written to disk, so that a crash costs at most this much."""
    models: tuple[Identifier, ...] = Field(default=(), max_length=64)
    """Models to train; empty: any."""
    dedicated: bool = False
    """The machine does nothing else: work whether it runs on batteries or somebody uses it."""
    page_port: Literal["off"] | Annotated[int, Field(ge=0, le=65535)] = 7420
    """Where the page of the running worker is served, on 127.0.0.1: there or at the next free port; 0: at any; "off":
    nowhere."""
