"""Files and folders that are written whole or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tbcm.errors import UserError, reason

TMP = ".tmp"
"""The end of a folder's name while it is filled."""
PART = ".part"
"""The end of a file's name while it is written, after a dot, its own name and the process."""


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, gone afterwards; what fails becomes a UserError."""
    name = f".{path.name}.{os.getpid()}{PART}"  # another process may write it too
    part = path.resolve().with_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as e:
        raise UserError(
            f"Cannot write {path}: {e.strerror}; mend that, or choose another place."
        ) from e
    finally:
        with suppress(OSError):
            part.unlink()


def is_part(path: Path) -> bool:
    """Whether a file is one that was being written when its process was killed."""
    return path.is_file() and re.fullmatch(rf"\..+\.\d+{re.escape(PART)}", path.name) is not None


def remove_parts(folder: Path) -> None:
    """What killed processes have left in a folder of files that they were writing."""
    for path in filter(is_part, folder.glob(f".*{PART}")):
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """A folder and all in it; of one that is a link, the link."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def _is_device(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all, through a temporary name beside it.

    A device or pipe, such as /dev/null, stays what it is, and a link a link.

    Raises:
        UserError: the place cannot be written.
    """
    path = Path(path)
    with _part_of(path) as part:
        if _is_device(path):
            path.write_bytes(data)
        else:
            part.write_bytes(data)
            flush(part)
            os.replace(part, path.resolve())
            flush(part.parent)


def check_writable(path: str | Path) -> None:
    """Learns before long work, and without touching the file, whether `path` can be written.

    Raises:
        UserError: it cannot.
    """
    if Path(path).is_dir():
        raise UserError(f"Cannot write {path}: it is a folder; give the name of a file.")
    with _part_of(Path(path)) as part:
        if not _is_device(Path(path)):
            part.touch()


AGAIN = "give the command again"
GO_ON = "continue with --resume_from_checkpoint latest"


@contextmanager
def writing(path: Path, then: str = AGAIN) -> Iterator[None]:
    """Turns a failed write (disc full, no permission) into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save follows the file's own error with one of its archive.
        told = error.__context__ if isinstance(error.__context__, OSError) else error
        why = getattr(told, "strerror", None) or reason(told)
        raise UserError(f"Cannot write {path}: {why}; mend that and {then}.") from error


def flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def can_make(folder: Path) -> bool:
    """Whether a folder, or the innermost around it that is there, can be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    return there.is_dir() and os.access(there, os.W_OK)


def check_new(path: Path) -> None:
    """Learn before long work that `whole_folder` can write and will replace nothing of the user's.

    Raises UserError if it cannot, or would.
    """
    path = path.absolute()
    for place in (path, path.with_name(path.name + TMP)):
        if os.path.lexists(place):
            raise UserError(f"{place} is there already; give a new folder, or move that away.")
    if not can_make(path):
        raise UserError(f"Cannot write {path}; give a place that can be written.")


@contextmanager
def whole_folder(path: Path, then: str = AGAIN, new: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path`, or vanishes if the body fails.

    What is at either name is replaced; of a `new` folder it stays, and is a UserError.
    """
    path = path.absolute()
    tmp = path.with_name(path.name + TMP)
    with writing(path, then):
        if not new:
            shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            yield tmp
            for file in (*tmp.rglob("*"), tmp):
                file.chmod(file.stat().st_mode | tmp.stat().st_mode & 0o666)  # safetensors: 0600
                flush(file)
            if new and os.path.lexists(path):
                raise UserError(f"{path} was made meanwhile; give a new folder, or move that away.")
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        if os.path.lexists(path):
            remove(path)
        tmp.rename(path)
        flush(path.parent)


def content(*places: Path, salt: str = "") -> str:
    """Fingerprint of what is in some files, a folder's among them."""
    found = hashlib.sha256(salt.encode())
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            with path.open("rb") as file:
                while part := file.read(2**20):
                    found.update(part)
    return found.hexdigest()
