"""Where the file of a run record lies, who may write it, and file systems on which SQLite cannot be trusted."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from pathlib import Path

from lipcore.recording.schema import RecordError

SUFFIX = ".lipcore"
#: Kinds of file systems whose locks, or memory maps, are not those of one machine.
_OF_A_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs")


def record_path(run: str | os.PathLike[str], rank: int) -> Path:
    """Return the file of one rank in a run's folder, which is made where it does not exist.

    Raises:
        TypeError, ValueError: `run` is no path of a folder.
        RecordError: the folder cannot be made or written to.
    """
    folder = checked_folder(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"run: {folder} cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecordError(f"run: {folder} cannot be written to; choose another folder")
    # Absolute, since the loop may go to another folder, and without links, by which a file would be written twice.
    return folder.resolve() / f"rank{rank}{SUFFIX}"


def checked_folder(run: str | os.PathLike[str]) -> Path:
    """Return a run's folder; a file, an empty name and one with `..` in it are refused."""
    if not isinstance(run, (str, os.PathLike)) or isinstance(run, bytes):
        raise TypeError(f"run: expected the path of a folder, got {type(run).__name__}")
    folder = Path(run)
    if not str(run).strip() or "\0" in str(run) or ".." in folder.parts:
        raise ValueError(f"run: expected the path of a folder, without '..', got {str(run)!r}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run: expected the path of a folder, and {folder} is a file")
    return folder


def of_a_network(folder: Path) -> str:
    """Return the kind of the file system that a folder lies on where that is a network's, or ""."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real, best, kind = str(folder.resolve()), "", ""
    for line in mounts:
        _, where, what, *_ = line.split(" ")
        where = where.replace("\\040", " ")
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, what
    return kind if kind in _OF_A_NETWORK or kind.startswith("fuse.") else ""


def local_copy(path: Path) -> Path:
    """Return a file of this machine's own for a record that lies on a network's file system."""
    folder = Path(tempfile.mkdtemp(prefix="lipcore-"))
    return folder / path.name


_held: set[Path] = set()  # by this process, in which the locks below would let two writers in


class Hold:
    """The right of this process to write a record; no other process gets it until close(), where the file system has
    locks.

    Raises:
        RecordError: another writer has it, in this process or in another; its file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = _lock_of(path)
        if self._path in _held:
            raise RecordError(
                f"run: {path} cannot be written twice: a Monitor of this process writes it already. Call its close() "
                "first (a `with` block does so whatever ends the loop; a trainer's callback has it as "
                "`callback.monitor`), or, where it is out of reach, end this process; or choose another folder"
            )
        try:
            self._file = _locked(self._path)
        except BlockingIOError as error:
            raise RecordError(
                f"run: {path} is being written by another process (number {error.strerror}); choose another folder, or "
                "end that"
            ) from None
        except OSError as error:
            raise RecordError(f"run: {self._path} cannot be made ({error.strerror}); choose another folder") from error
        _held.add(self._path)

    def close(self) -> None:
        """Give it back."""
        _held.discard(self._path)
        with contextlib.suppress(OSError):
            self._path.unlink()  # without locks too, where it alone says that the record is being written
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _lock_of(path: Path) -> Path:
    """Return the file whose lock is the right to write a record. Not the database's own: closing that would drop the
    locks that SQLite has on it."""
    return path.resolve().with_name(path.name + "-writer")


def _locked(path: Path) -> int | None:
    """Make and lock a file, which holds this process's number; return its descriptor, or None where there are no locks.

    Raises:
        BlockingIOError: another process has the lock; its text is that process's number.
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(file, 32).decode(errors="replace") or "unknown"
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, owner) from None
            return None  # file systems of clusters may have no locks
        try:
            if os.fstat(file).st_nlink:
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)  # whoever had it has removed it meanwhile: a lock of a file that nobody else will find


def rank_of(path: Path) -> int | None:
    """Return the rank whose record a file is, by its name; None where that does not say it."""
    found = re.fullmatch(rf"rank(\d+){re.escape(SUFFIX)}", path.name)
    return None if found is None else int(found[1])


def was_cut_off(path: Path) -> bool:
    """Say whether the writer of a record has ended without closing it: nobody writes it, and the right to do so was not
    given back."""
    return _lock_of(path).exists() and not being_written(path)


def being_written(path: Path) -> bool:
    """Say whether a process, this one or another, has the right to write a record now."""
    lock = _lock_of(path)
    if lock in _held:  # not by the lock: to close its file here would give it back
        return True
    try:
        import fcntl

        file = os.open(lock, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
