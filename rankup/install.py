"""Moving the files of a version from `.partial` into place.

What always holds:
- nothing is moved before every file has arrived; from then on there are only renames and removals, a few
  milliseconds for any size. In between `.rankup.json` says `complete: false`;
- every file is replaced whole: who has one open goes on reading the old one. A reader that opens several files while
  they are being moved may see some old and some new; it is safe who reads `.rankup.json` before and after, and finds
  both times `complete: true` and the same `manifest`;
- killed anywhere in here, the next pull finds every byte again;
- only files that a pull put there are ever removed or replaced: what somebody else put under a name that is needed gets
  another name.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from rankup.durable import sync_file, sync_folder
from rankup.folder import ENVELOPE_NAME, PARTIAL_NAME, FolderState, disk_errors, write_durably, write_folder_state
from rankup.records import FileEntry


def forget_parts(folder: Path, keep: Collection[str]) -> None:
    """Remove what lies in `.partial`, except the parts with these digests."""
    partial = folder / PARTIAL_NAME
    with disk_errors(partial):
        for part in partial.iterdir() if partial.is_dir() else ():
            if part.name not in keep:
                part.unlink()


def install(
    folder: Path, state: FolderState, files: Sequence[FileEntry], missing: Sequence[FileEntry], envelope: bytes
) -> list[Path]:
    """Put `missing`, which lie in `.partial`, into place, and remove what is no longer wanted; `files` are all files of
    the version, `state` is what the folder shall remember of it. Returns where files that were in the way are now.

    Raises DiskFullError, SetupError: the disk.
    """
    partial = folder / PARTIAL_NAME
    names = {file.path for file in files}
    owned = {file.path for file in state.files}
    obsolete = tuple(file for file in state.files if file.path not in names)
    with disk_errors(folder):
        partial.mkdir(exist_ok=True)
        write_durably(partial / ENVELOPE_NAME, envelope)
        moves: list[tuple[Path, Path]] = []
        taken: set[str] = set()
        for file in missing:
            arrived = partial / file.sha256
            if file.sha256 in taken:
                # Two files with the same bytes: the second gets its own copy, before anything is moved.
                arrived = partial / f"{file.sha256}.{len(moves)}"
                shutil.copyfile(partial / file.sha256, arrived)
                sync_file(arrived)
            taken.add(file.sha256)
            moves.append((arrived, folder / file.path))
        set_aside = [_set_aside(place) for _, place in moves if place.name not in owned and place.exists()]
        if moves or obsolete:
            write_folder_state(folder, state.model_copy(update={"complete": False, "files": (*files, *obsolete)}))
        for arrived, place in moves:
            arrived.replace(place)
        for file in obsolete:
            (folder / file.path).unlink(missing_ok=True)
        (partial / ENVELOPE_NAME).replace(folder / ENVELOPE_NAME)
        sync_folder(folder)
        write_folder_state(folder, state.model_copy(update={"complete": True, "files": tuple(files)}))
        shutil.rmtree(partial, ignore_errors=True)
    return set_aside


def _set_aside(place: Path) -> Path:
    """Give a file that no pull put there another name."""
    for number in itertools.count(1):
        other = place.with_name(f"{place.name}.before-pull-{number}")
        if not other.exists():
            break
    return place.rename(other)
