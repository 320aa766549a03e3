"""A pulled version as a repository on a hub: checked here, uploaded with the hub's own client, checked there, tagged.

What always holds:
- nothing is uploaded that the signed manifest does not name, but the sealed manifest itself; so what else lies in the
  folder (the pinned key, locks, half a download, notes) stays here;
- a folder that does not verify is refused before the hub is asked for anything;
- a repository that holds something other than a version is left alone;
- the tag is set only after the hub has named the right hash for every file of the commit; a tag that is there already
  is never moved;
- doing it again after an interruption ends in the same place: bytes that the hub has are not sent twice.

The token goes to the client and nowhere else. huggingface_hub is imported only inside functions. Uploads larger than
the hub's limit for ordinary files go through its large file storage, by the client's choice over Xet or HTTP; where a
hub does not speak Xet, HF_HUB_DISABLE_XET=1 keeps the client to HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import rankup
from rankup.checkfiles import sealed_manifest, verify_files
from rankup.download import OnProgress
from rankup.errors import (
    BusyError,
    ConflictError,
    DeniedError,
    InputError,
    IntegrityError,
    NotFoundError,
    RankupError,
    SetupError,
    StateError,
    UnauthenticatedError,
    UnreachableError,
)
from rankup.folder import ENVELOPE_NAME, folder_lock, read_folder_state, sha256_of
from rankup.records import FileEntry, Manifest
from rankup.versions import open_envelope

ALWAYS_THERE: Final = frozenset((".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"))
"""What a new repository may hold before the first version."""
_STALE: Final = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?|contributions\.json")
"""Files of an earlier version that would be loaded or believed beside the new ones."""
_PIECE_BYTES: Final = 1024 * 1024
_MAX_TAG_MESSAGE: Final = 400


@dataclass(frozen=True)
class HubFile:
    """One file to upload."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class HubPlan:
    """What would be uploaded of a folder; everything in it was checked."""

    folder: Path
    manifest: Manifest
    digest: str
    publisher_key: str
    files: tuple[HubFile, ...]
    """Sorted by path."""

    @property
    def tag(self) -> str:
        return f"v{self.manifest.version}"

    @property
    def title(self) -> str:
        """Summary of the commit."""
        return f"{self.manifest.model} version {self.manifest.version} (manifest {self.digest[:16]})"

    @property
    def description(self) -> str:
        return f"manifest {self.digest}\nsigned by {self.publisher_key}\nuploaded with rankup {rankup.__version__}"


@dataclass(frozen=True)
class HubUpload:
    """A version on the hub. `uploaded` is False where it was there already."""

    repo: str
    url: str
    revision: str
    commit: str
    tag: str
    uploaded: bool
    deleted: tuple[str, ...]
    """Weight files of an earlier version that the commit removed."""


def plan_upload(folder: Path, *, publisher_key: str | None = None, progress: OnProgress | None = None) -> HubPlan:
    """Check the folder and list what belongs on the hub. Uses no network.

    `publisher_key` (hex): instead of the key that the folder has pinned.

    Raises:
        NotFoundError: no complete version lies in the folder.
        StateError: it holds the float32 masters, which are no model to load.
        IntegrityError: a file or the signature is not what the manifest says.
    """
    state = read_folder_state(folder)
    if state is not None and state.want != "export":
        raise StateError(f"{folder} holds the masters of a version", remedy="Pull the version itself into a folder.")
    report = verify_files(folder, publisher_key=publisher_key, progress=progress)
    if not report.ok:
        raise IntegrityError(
            f"{folder} is not the version that its publisher signed: {', '.join(report.mismatches[:8])}",
            remedy="Pull the version again, then publish it.",
        )
    envelope = sealed_manifest(folder)
    manifest, digest, key = open_envelope(envelope, publisher_key=report.publisher_key)
    if digest != report.manifest:
        raise IntegrityError(f"the manifest in {folder} changed while it was checked", remedy="Publish it again.")
    entries = [_hub_file(entry) for entry in manifest.export_files()]
    entries.append(HubFile(ENVELOPE_NAME, len(envelope), hashlib.sha256(envelope).hexdigest()))
    return HubPlan(folder, manifest, digest, key, tuple(sorted(entries, key=lambda file: file.path)))


def _hub_file(entry: FileEntry) -> HubFile:
    return HubFile(entry.path, entry.size_bytes, entry.sha256)


def publish(
    plan: HubPlan,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str = "main",
) -> HubUpload:
    """Upload what `plan` lists to the repository `repo`, which is made where it is missing, and tag it.

    Args:
        repo: name, or organisation/name.
        private: only for a repository that has to be made.
        token: default: that of the client (HF_TOKEN, or `hf auth login`).
        endpoint: address of the hub; default: that of the client (HF_ENDPOINT).
        revision: branch; it is made where it is missing.

    Raises:
        InputError: a name is not one, or the hub refuses the model card.
        UnauthenticatedError, DeniedError: no token, or not for this repository.
        StateError: the repository holds something else, or the tag of this version with other contents.
        IntegrityError: the hub did not take the files as they are.
        RetryableError: the hub does not answer, or somebody else wrote at the same time.
        SetupError: the client is not installed, or was told to stay offline.
    """
    with _hub_errors(repo), folder_lock(plan.folder):
        api = _client(token, endpoint)
        made = api.create_repo(repo, private=private, exist_ok=True)
        name, url = str(made.repo_id), str(made)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(name).tags}
        if plan.tag in tags:
            return _already_there(api, plan, name, url, revision, tags[plan.tag])
        if revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        stale = _stale_files(api, plan, name, revision)
        commit = _commit(api, plan, name, revision, stale)
        _require_arrived(plan, _listed(api, plan, name, commit))
        api.create_tag(name, tag=plan.tag, revision=commit, tag_message=plan.description[:_MAX_TAG_MESSAGE])
    return HubUpload(name, url, revision, commit, plan.tag, uploaded=True, deleted=stale)


def _client(token: str | None, endpoint: str | None) -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi(
        endpoint=endpoint, token=token, library_name="rankup", library_version=rankup.__version__
    )


def _commit(api: Any, plan: HubPlan, name: str, revision: str, stale: tuple[str, ...]) -> str:
    """The commit's id; the client sends only bytes that the hub does not have."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=str(plan.folder / file.path)) for file in plan.files
    ]
    operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
    done = api.create_commit(
        name,
        operations,
        commit_message=plan.title,
        commit_description=plan.description,
        revision=revision,
    )
    return str(done.oid)


# -- what is there -----------------------------------------------------------------------------------------------------


def _stale_files(api: Any, plan: HubPlan, name: str, revision: str) -> tuple[str, ...]:
    """Files of an earlier version to remove. Raises StateError where the repository holds something else."""
    there = {item.path for item in api.list_repo_tree(name, revision=revision)}
    others = sorted(there - ALWAYS_THERE)
    if others and ENVELOPE_NAME not in there:
        raise StateError(
            f"{name} holds files that are no version, such as {others[0]}",
            remedy="Choose another repository, or another --revision.",
        )
    wanted = {file.path for file in plan.files}
    return tuple(path for path in others if path not in wanted and _STALE.fullmatch(path))


def _already_there(api: Any, plan: HubPlan, name: str, url: str, revision: str, commit: str) -> HubUpload:
    try:
        _require_arrived(plan, _listed(api, plan, name, commit))
    except IntegrityError as exc:
        raise StateError(
            f"{name} has the tag {plan.tag} already, with other contents",
            remedy="Publish to another repository, or remove the tag on the hub if you are sure.",
        ) from exc
    return HubUpload(name, url, revision, commit, plan.tag, uploaded=False, deleted=())


def _listed(api: Any, plan: HubPlan, name: str, commit: str) -> Mapping[str, Any]:
    return {item.path: item for item in api.get_paths_info(name, [file.path for file in plan.files], revision=commit)}


def _require_arrived(plan: HubPlan, there: Mapping[str, Any]) -> None:
    """Compare what the hub says of each file: sha256 of large ones, git's own hash of the others."""
    for file in plan.files:
        item = there.get(file.path)
        lfs = getattr(item, "lfs", None)
        if item is None or item.size != file.size_bytes:
            same = False
        elif lfs is not None:
            same = lfs.sha256 == file.sha256
        else:
            same = item.blob_id == _git_hash(plan.folder / file.path, file)
        if not same:
            raise IntegrityError(
                f"the hub does not hold {file.path} as it was sent",
                remedy="Publish again; if it stays, look at the repository's .gitignore. The tag was not set.",
            )


def _git_hash(path: Path, file: HubFile) -> str:
    """Git's name of a blob: sha1 over its kind, its length and its bytes (git-scm.com, "Git Objects").

    Raises IntegrityError where the file is no longer the one that was planned.
    """
    if sha256_of(path) != file.sha256:
        raise IntegrityError(f"{path} changed while it was uploaded", remedy="Pull the version again.")
    digest = hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# -- errors ------------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the client raises into errors of ours. Their texts come from the hub: only one line of them is kept."""
    try:
        from huggingface_hub import errors
    except ImportError as exc:
        raise SetupError(
            "publishing to a hub needs the Python package huggingface_hub", remedy="pip install huggingface_hub"
        ) from exc
    try:
        yield
    except RankupError:
        raise
    except errors.OfflineModeIsEnabled as exc:
        raise SetupError("the hub's client was told to stay offline", remedy="Unset HF_HUB_OFFLINE.") from exc
    except errors.LocalTokenNotFoundError as exc:
        raise _no_token() from exc
    except errors.HfHubHTTPError as exc:
        raise _of_status(repo, exc.response.status_code, _line(exc)) from exc
    except errors.HFValidationError as exc:
        raise InputError(
            f"{repo!r} is no name of a repository: {_line(exc)}", remedy="Write NAME or ORG/NAME."
        ) from exc
    except ValueError as exc:
        raise InputError(f"the hub refuses this: {_line(exc)}") from exc
    except (errors.HTTPError, OSError, RuntimeError) as exc:
        cause = exc.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _of_status(repo, cause.response.status_code, _line(cause)) from exc
        line = _line(cause or exc)
        again = "Run the same command again: what has arrived is not sent twice."
        if "xet" in line.lower():
            again += " If this hub does not speak Xet, set HF_HUB_DISABLE_XET=1 first."
        raise UnreachableError(f"the hub does not answer: {line}", remedy=again) from exc


def _no_token() -> UnauthenticatedError:
    return UnauthenticatedError(
        "the hub wants a token with write access", remedy="Set HF_TOKEN, or log in with `hf auth login`."
    )


def _of_status(repo: str, status: int, line: str) -> RankupError:
    match status:
        case 401:
            return _no_token()
        case 403:
            return DeniedError(f"the token may not write to {repo}: {line}", remedy="Use a token with write access.")
        case 404:
            return NotFoundError(f"the hub has no {repo}, or does not show it: {line}", remedy="Check the name.")
        case 409 | 412:
            return ConflictError(f"somebody else changed {repo} at the same time: {line}")
        case 429:
            return BusyError("the hub asks to come back later")
        case _ if status >= 500:
            return UnreachableError(f"the hub answers with {status}: {line}")
        case _:
            return InputError(f"the hub refuses this with {status}: {line}")


def _line(exc: BaseException) -> str:
    """What stands first in a message of the client, on one line."""
    text = getattr(exc, "server_message", None) or str(exc) or type(exc).__name__
    return "".join(c if c.isprintable() else " " for c in text.strip().splitlines()[0])[:300]
