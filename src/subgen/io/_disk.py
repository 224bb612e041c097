"""Replace a file in one step, whole or not at all, and keep its access rights."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_file"]

# Names may have 255 bytes; those of temporary files are longer than the file's.
_LONGEST_NAME = 200


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file in the same folder, sync it, and move it in place: a crash leaves the old file or the new.

    Parameters
    ----------
    path : Path
        A link stays, and the file that it leads to is replaced. A new file gets the mode that ``open`` gives it, by
        the umask; an old one keeps its mode, and its owner and group where the system lets them be given.
    write : callable
        Called with a binary file, open for writing and seekable.

    Raises
    ------
    OSError
        If the file cannot be written, or is not a regular file.
    """
    target = Path(os.path.realpath(path))
    old = _regular(target)
    name = os.fsencode(target.name)[:_LONGEST_NAME].decode(errors="ignore")
    temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    # Never more open than the old file, from the first byte on.
    descriptor = os.open(temporary, flags, 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o777)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if old is not None:
                _give_access(file.fileno(), old)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    # The new name is on the disk once the folder is; not every system can.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _regular(target: Path) -> os.stat_result | None:
    """Return the status of a regular file, or None if there is no file."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder, make it first", str(target.parent)) from None
        return None
    if stat.S_ISLNK(found.st_mode):  # what links lead to was followed: these lead to each other
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    return found


def _give_access(descriptor: int, old: os.stat_result) -> None:
    """Give a file the owner, group and mode of another, as far as the system allows."""
    if not hasattr(os, "fchown"):  # pragma: no cover - Windows
        return
    mode = stat.S_IMODE(old.st_mode)
    try:
        os.fchown(descriptor, old.st_uid, old.st_gid)
    except OSError:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:  # of another group: it gets what all others have
            mode = mode & ~0o6070 | (mode & 0o007) << 3
        else:
            mode &= ~0o4000
    with contextlib.suppress(OSError):  # not every file system has modes
        os.fchmod(descriptor, mode)
