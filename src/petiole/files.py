"""Every read and write of files in petiole: atomic, digested, strict.

An adaptation is ONE safetensors file, and one rename is its commit; a row of results is one append; a checkpoint is a
folder whose manifest comes last. Nothing is ever unpickled, and nothing in a file chooses code or a path.
`docs/files.md` describes the formats.

All system calls that change a disk go through the small functions of the next section, so that a test can make each one
fail in turn.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn

from petiole.errors import FileError, PetioleError

try:
    import fcntl
except ImportError:  # Windows: two processes that append to one file are not kept apart there
    fcntl = None  # type: ignore[assignment]

AnyPath: TypeAlias = "str | os.PathLike[str]"
Piece: TypeAlias = "bytes | bytearray | memoryview"

FORMAT = 1  # of the adaptation file; raise it when a reader of today would misread the file
MANIFEST = "manifest.json"
KEY = "petiole"  # the one metadata key of the safetensors header
MARGIN = 16 << 20  # bytes that a disk is to have left over
LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself

# --- system calls: nothing below this section writes by any other way -------------------------------------------------

_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe in a file's place must not hang the reader


def _open(path: AnyPath, flags: int, mode: int = 0o666) -> int:
    return os.open(path, flags | _FLAGS, mode)


def _write(fd: int, data: Piece) -> int:
    return os.write(fd, data)


def _truncate(fd: int, length: int) -> None:
    os.ftruncate(fd, length)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _close(fd: int) -> None:
    os.close(fd)


def _replace(source: AnyPath, target: AnyPath) -> None:
    os.replace(source, target)


def _unlink(path: AnyPath) -> None:
    os.unlink(path)


def _make_folder(path: AnyPath) -> None:
    os.makedirs(path, exist_ok=True)


def _fsync_dir(folder: AnyPath) -> None:
    """Make the names in a folder durable, where the system can do that at all."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(fd)


# --- errors in words --------------------------------------------------------------------------------------------------

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of its path is no folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reports an input/output error",
}


def _shown(path: AnyPath) -> str:
    """A path for a message: one line, whatever the name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def _quoted(text: object) -> str:
    """A name that came out of a file, for a message: one line, plain characters, not too long."""
    words = ascii(text)
    return words if len(words) <= 80 else words[:76] + "...'"


def _size(count: float) -> str:
    """4.2 GB for 4200000000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def _faults(path: AnyPath, verb: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError into a FileError that names the path, what failed and what to do."""
    try:
        yield
    except PetioleError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        number = getattr(error, "errno", None)
        if number == errno.ENOENT:
            reason = "no such folder" if verb in ("written", "appended to") else "no such file"
        else:
            reason = _REASONS.get(number or 0) or getattr(error, "strerror", None) or str(error)
        fault = FileError(f"{_shown(path)} can't be {verb}: {reason}." + ("\n" + advice if advice else ""))
        fault.errno = number
        raise fault from error


FULL = {errno.ENOSPC, errno.EDQUOT}
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")  # torch.save gives no errno; its message names what writes


def full(error: BaseException) -> bool:
    """Whether an error, of this module or not, says that a disk took no more."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER)


_OLD_FILE_STAYS = "What was there before is unchanged. Make room or choose another folder, then save again."

# --- whole files ------------------------------------------------------------------------------------------------------


def write_bytes(path: AnyPath, data: Piece) -> None:
    """Write a file atomically and durably: at any moment the path holds the whole old file or the whole new one.

    A link is followed and stays a link; an existing file keeps its permission bits, a new one gets those of the umask.

    Raises:
        FileError: the disk is full, the folder is missing or read-only, …; the old file is then unchanged.
    """
    _commit(path, [data])


def write_text(path: AnyPath, text: str) -> None:
    """`write_bytes` of a text in UTF-8, line ends as they are."""
    with _faults(path, "written"):  # a lone surrogate is a ValueError
        data = text.encode()
    _commit(path, [data])


def write_json(path: AnyPath, value: Any) -> None:
    """`write_bytes` of a value as JSON for people: sorted keys, two spaces, a newline at the end; NaN is refused."""
    plain = _plain(value, path, "value")
    with _faults(path, "written"):  # an integer of thousands of digits is a ValueError
        text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_bytes(path: AnyPath) -> bytes:
    """The content of a regular file, read once and whole.

    Raises:
        FileError: there is no such file, it can't be read, or it is no regular file.
    """
    with _faults(path, "read"):
        fd = _open(path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            _only_regular(status, path)
            with open(fd, "rb", buffering=0, closefd=False) as file:
                return file.readall()
        except MemoryError:
            raise FileError(
                f"{_shown(path)} can't be read: its {_size(status.st_size)} don't fit into memory."
            ) from None
        finally:
            _close(fd)


def _only_regular(status: os.stat_result, path: AnyPath) -> None:
    """Refuse folders, devices and pipes."""
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "folder")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{_shown(path)} is no regular file: petiole reads and writes nothing else.")


def read_text(path: AnyPath) -> str:
    """`read_bytes` as UTF-8, line ends as they are."""
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"{_shown(path)}, line {line}: not UTF-8 text.") from None


def read_json(path: AnyPath) -> Any:
    """The value in a JSON file; a key that stands twice and numbers that JSON does not know are refused."""
    return _json(read_text(path), path, "the file")


def _commit(path: AnyPath, pieces: Iterable[Piece], before: Callable[[], None] | None = None) -> None:
    """Write a temporary file beside `path`, make it durable, call `before`, and rename: that is the commit."""
    with _faults(path, "written", _OLD_FILE_STAYS):
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        mode = None
        with suppress(FileNotFoundError):
            old = os.stat(target)
            _only_regular(old, path)
            mode = stat.S_IMODE(old.st_mode)
        temporary = os.path.join(folder, f".petiole-{secrets.token_hex(8)}.tmp")  # os.urandom: no generator moves
        fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                if mode is not None:
                    with suppress(OSError, AttributeError):  # an old Windows has no such call
                        os.fchmod(fd, mode)
                for piece in pieces:
                    _write_all(fd, piece)
                _fsync(fd)
            finally:
                _close(fd)
            if before is not None:
                before()
            _fsync_dir(
                folder
            )  # nearly free after the fsync above; a folder that can't be synced fails here, before the commit
            _replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                _unlink(temporary)
            raise
    with _faults(
        path,
        "made durable",
        "The new file is in place and whole, but a power cut now could bring the old one back. Save again.",
    ):
        _fsync_dir(folder)


def _write_all(fd: int, piece: Piece) -> None:
    view = memoryview(piece)
    view = view.cast("B") if view.nbytes else view[:0]  # a view of nothing has no cast
    while view:
        count = _write(fd, view[: 1 << 26])  # some systems refuse 2 GiB and more at once
        if count <= 0:
            raise OSError(errno.EIO, "nothing was written")
        view = view[count:]


def sweep(folder: AnyPath, older_than: float = 86_400) -> None:
    """Remove the temporary files that killed processes left behind.

    Args:
        older_than: seconds. A day: no save that still runs is that slow. 0 where it is known that no other process writes here.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if fnmatch.fnmatchcase(entry.name, ".petiole-*.tmp") and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime <= time.time() - older_than:
                        _unlink(entry.path)


def check_writable(folder: AnyPath, bytes_needed: int = 0, advice: str = "or keep fewer checkpoints") -> None:
    """Find out before a long run whether its results can be written; makes the folder.

    Args:
        folder: where the run will write.
        bytes_needed: what it will write there, all together; a tenth and 16 MiB are added, since others write too.
        advice: what else helps where there is too little room.

    Raises:
        FileError: the folder can't be made or written, or its disk has less room.
    """
    with _faults(folder, "written", "Choose another folder, or change its permissions."):
        _make_folder(folder)
        sweep(folder)
        probe = os.path.join(folder, f".petiole-{secrets.token_hex(8)}.tmp")
        fd = _open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                _write_all(fd, b"petiole")
                _fsync(fd)
            finally:
                _close(fd)
        finally:
            with suppress(OSError):
                _unlink(probe)
        free = shutil.disk_usage(folder).free
    needed = bytes_needed + bytes_needed // 10 + MARGIN if bytes_needed else 0
    if free < needed:
        fault = FileError(
            f"{_shown(folder)}: the run needs {needed} bytes ({_size(needed)}), its disk has {free} bytes ({_size(free)}) left.\n"
            f"Make room, choose another folder, {advice}."
        )
        fault.errno = errno.ENOSPC
        raise fault


def check_target(path: AnyPath, bytes_needed: int = 0) -> None:
    """`check_writable` for one file: its folder is made and can be written, and no folder lies in the file's place.

    Raises:
        FileError: it can't be written, or its disk has less room.
    """
    with _faults(path, "written", "Name a file that does not exist yet, or one to replace."):
        target = os.path.realpath(path)
        if os.path.isdir(target):
            raise OSError(errno.EISDIR, "folder")
    check_writable(os.path.dirname(target), bytes_needed, "or train fewer parameters")


# --- rows -------------------------------------------------------------------------------------------------------------


def append_line(path: AnyPath, text: str) -> int:
    """Append one row durably, in a single write. Processes that append to one file wait for each other.

    A last line without its newline is what an interrupted write left: it is cut off first. A row that could not be
    written whole is taken back.

    Returns:
        How many bytes of a torn row were cut off, 0 in a sound file.

    Raises:
        FileError: the text holds a line break, or the file can't be written; its rows are then unchanged.
    """
    if "\n" in text:
        raise FileError(f"{_shown(path)}: a row can't hold a line break; write it as JSON on one line.")
    with _faults(path, "appended to", "The rows that were there are unchanged."):
        row = (text + "\n").encode()
        target = os.path.realpath(path)
        fd = _open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks; an append is one write all the same
                    fcntl.flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            whole = _whole_rows(fd, size)
            if whole < size:
                _truncate(fd, whole)
            try:
                if _write(fd, row) != len(row):
                    raise OSError(errno.ENOSPC, "short write")
                _fsync(fd)
                if whole == 0:  # the file may be new: make its name durable too
                    _fsync_dir(os.path.dirname(target))
            except BaseException:
                with suppress(OSError):
                    _truncate(fd, whole)
                raise
        finally:
            _close(fd)
    return size - whole


def _whole_rows(fd: int, size: int) -> int:
    """How many bytes of a file end with a newline; read from the end, so a sound file costs one block."""
    end = size
    while end > 0:
        start = max(0, end - (1 << 16))
        os.lseek(fd, start, os.SEEK_SET)
        at = os.read(fd, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def read_lines(path: AnyPath) -> tuple[list[str], str]:
    """The rows of a file, and the torn last row ("" if there is none), which counts as not written.

    Raises:
        FileError: the file can't be read, or a whole row is no UTF-8 text.
    """
    data = read_bytes(path)
    end = data.rfind(b"\n") + 1
    try:
        rows = data[:end].decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"{_shown(path)}, line {line}: not UTF-8 text.\nRemove the line, or the file.") from None
    return rows, data[end:].decode(errors="replace")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _plain(value: Any, path: AnyPath, where: str) -> Any:
    """A copy made of JSON's own types, tuples as lists.

    Refused, by name: other types, keys that are no text, and numbers that are not finite.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FileError(f"{_shown(path)} can't be written: {_quoted(where)} is {value}, which JSON does not know.")
        return value
    try:
        if isinstance(value, (list, tuple)):
            return [_plain(item, path, f"{where}.{i}") for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise FileError(
                        f"{_shown(path)} can't be written: {_quoted(where)} has a key that is no text, {_quoted(key)}."
                    )
            return {key: _plain(item, path, f"{where}.{key}") for key, item in value.items()}
    except RecursionError:
        raise FileError(f"{_shown(path)} can't be written: {_quoted(where[:40])} is nested too deeply.") from None
    raise FileError(
        f"{_shown(path)} can't be written: {_quoted(where)} is a {type(value).__name__}, which JSON does not know."
    )


def _canonical(value: Any) -> str:
    """The one JSON text of a value, so that the same content is the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _json(text: str, path: AnyPath, what: str) -> Any:
    """Parse JSON strictly."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {_quoted(twice)} stands there twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{_quoted(number)} is no finite number")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise FileError(f"{_shown(path)}: {what} is damaged: JSON nested too deeply.") from None
    except ValueError as error:
        raise FileError(f"{_shown(path)}: {what} is damaged: no valid JSON ({error}).") from None


# --- the adaptation file ----------------------------------------------------------------------------------------------

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NO_DIGEST = b"0" * 64


def save_adaptation(path: AnyPath, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Write an adaptation: one safetensors file, committed by one rename. The same content gives the same bytes.

    Beside it, `<name>.json` gets a pretty copy of the header for people. It is never read, so failing to write it is a
    warning only.

    Args:
        path: the file; by custom `<name>.petiole.safetensors`.
        tensors: by name; each gets bytes of its own, whatever device, stride or storage it has. Nothing may change them
            meanwhile.
        header: JSON values: methods, configuration, fingerprint, … The keys "format" and "digest" are set here.

    Returns:
        The digest that the file carries.

    Raises:
        FileError: a tensor holds NaN or infinity or has no plain values, the header is no JSON, or the disk refuses;
            what was at `path` is then unchanged.
    """
    named = {name: _stored(tensor, name, path) for name, tensor in tensors.items()}
    # The widest dtypes first, as safetensors itself does, so that every tensor is aligned in the file; then by name.
    order = sorted(named, key=lambda name: (-named[name].element_size(), name))
    table: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + named[name].numel() * named[name].element_size()
        table[name] = {
            "dtype": _DTYPES[named[name].dtype],
            "shape": list(named[name].shape),
            "data_offsets": [start, end],
        }

    head: dict[str, Any] = {**_plain(header, path, "header"), "format": FORMAT}
    with _faults(path, "written"):  # a lone surrogate or an integer of thousands of digits is a ValueError
        # The mark stands in the digest's place while that place is looked up; as a digest it is found nowhere else.
        mark = hashlib.sha256(_canonical(head).encode()).hexdigest()
        outer = {"__metadata__": {KEY: _canonical({**head, "digest": mark})}, **table}
        raw = json.dumps(outer, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > LONGEST_HEADER:
        raise FileError(
            f"{_shown(path)} can't be written: its header has {_size(len(raw))}, at most {_size(LONGEST_HEADER)} fit."
        )
    front = bytearray(len(raw).to_bytes(8, "little") + raw)
    place = slice(at := front.index(mark.encode()), at + 64)

    front[place] = _NO_DIGEST
    pieces: list[Piece] = [front, *(_bytes(named[name]) for name in order)]
    digest = _digest(pieces)
    front[place] = digest.encode()

    def copy_for_people() -> None:
        shown = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in table.items()}
        try:
            write_json(copy_path(path), {**head, "digest": digest, "tensors": shown})
        except FileError as error:
            warnings.warn(f"The copy for people of {_shown(path)} was not written: {error}", stacklevel=4)

    sweep(os.path.dirname(os.path.realpath(path)))
    _commit(path, pieces, before=copy_for_people)
    return digest


def load_adaptation(path: AnyPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adaptation. The file is read once; what was digested is what is parsed. Takes twice its size in memory.

    Returns:
        The tensors by name, on the CPU, and the header with its "format" and "digest".

    Raises:
        FileError: the file can't be read, is another kind of file, was written by a newer petiole, or is damaged in any
            bit.
    """
    return parse(read_bytes(path), path)


def parse(data: bytes, path: AnyPath = "the file") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`load_adaptation` of bytes in memory; `path` is for messages only."""
    at = _shown(path)
    if len(data) < 10:  # eight bytes of length and "{}"
        raise FileError(f"{at} is damaged: {len(data)} bytes are too few for a safetensors file.")
    length = int.from_bytes(data[:8], "little")
    if length > LONGEST_HEADER or length > len(data) - 8:
        raise FileError(
            f"{at} is cut short, or no safetensors file: a header of {_size(length)} in {_size(len(data))}.\n"
            "petiole reads no other kind of file, and never unpickles one."
        )
    front = data[: 8 + length]
    try:
        text = front[8:].decode()
    except UnicodeDecodeError:
        raise FileError(f"{at}: its header is damaged, or it is no safetensors file: no UTF-8 text.") from None

    outer = _json(text, path, "its header")
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise FileError(f"{at} is not a petiole file: its header has no {KEY!r} entry.")
    head = _json(metadata[KEY], path, "its header")
    version = head.get("format") if isinstance(head, dict) else None
    if type(version) is not int or version < 1:
        raise FileError(f"{at} is damaged: its header gives no format number.")
    if version > FORMAT:
        raise FileError(
            f"{at} was written by a newer petiole: format {_quoted(version)}, this one reads up to {FORMAT}.\n"
            "Update petiole."
        )

    digest = head.get("digest")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) or front.count(digest.encode()) != 1:
        raise FileError(f"{at} is damaged: its header holds no digest.")
    place = front.index(digest.encode())
    rest = memoryview(data)
    if _digest([rest[:place], _NO_DIGEST, rest[place + 64 :]]) != digest:
        raise FileError(f"{at} is damaged: its content does not match its digest.\nFetch or save it again.")

    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the digest holds, so the file was made by hand; whatever it breaks is its fault
        raise FileError(f"{at} is no valid safetensors file: {_quoted(str(error))}.") from None
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise FileError(f"{at} is refused: its tensor {_quoted(name)} holds NaN or infinity.")
    return dict(sorted(tensors.items())), head


def copy_path(path: AnyPath) -> Path:
    """Where the copy of an adaptation's header for people lies: `x.json` for `x.safetensors`, else `<name>.json`."""
    file = Path(path)
    return file.with_suffix(".json") if file.suffix == ".safetensors" else file.with_name(file.name + ".json")


def _digest(pieces: Iterable[Piece]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def _stored(tensor: Tensor, name: str, path: AnyPath) -> Tensor:
    """The plain, contiguous CPU tensor that goes into the file, or a refusal that names it."""
    at = f"{_shown(path)} can't be written: "
    if hasattr(tensor, "full_tensor"):  # sharded over processes, which all save
        tensor = tensor.full_tensor()
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise FileError(f"{at}{_quoted(name)} is no name for a tensor.")
    if (
        not isinstance(tensor, Tensor)
        or nn.parameter.is_lazy(tensor)
        or type(tensor.detach()) is not Tensor
        or tensor.layout != torch.strided
    ):
        raise FileError(f"{at}{_quoted(name)} is no plain tensor ({type(tensor).__name__}); give its values as one.")
    if tensor.dtype not in _DTYPES:
        raise FileError(f"{at}the tensor {_quoted(name)} has dtype {tensor.dtype}, which safetensors does not know.")
    if tensor.device.type == "meta":
        raise FileError(f"{at}the tensor {_quoted(name)} is on the meta device and has no values.")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not _finite(plain):
        raise FileError(
            f"{at}the tensor {_quoted(name)} holds NaN or infinity.\nTraining went wrong before; save an earlier state."
        )
    return plain


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; in pieces, so that a big tensor needs no second one."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    narrow = tensor.is_floating_point() and tensor.element_size() == 1  # float8 has no isfinite
    return all(
        bool(torch.isfinite(piece.float() if narrow else piece).all()) for piece in tensor.reshape(-1).split(1 << 22)
    )


# --- checkpoint folders -----------------------------------------------------------------------------------------------


def write_manifest(folder: AnyPath) -> None:
    """Declare a folder whole: make its files durable, then write `manifest.json` with the size and SHA-256 of each.

    Names that start with a dot are left out. Call it last; remove nothing and add nothing afterwards.

    Raises:
        FileError: a file can't be read or made durable, or the manifest can't be written.
    """
    entries = {}
    for name, file in _listing(folder).items():
        with _faults(file, "made durable"):
            fd = _open(file, os.O_RDONLY)
            try:
                size, digest = _sum(fd)
                _fsync(fd)
            finally:
                _close(fd)
        entries[name] = {"size": size, "sha256": digest}
    for inner in sorted({os.path.dirname(os.path.join(folder, name)) for name in entries}):
        with _faults(inner, "made durable"):
            _fsync_dir(inner)
    write_json(os.path.join(folder, MANIFEST), {"format": FORMAT, "files": entries})


def verify_manifest(folder: AnyPath) -> list[str]:
    """What is wrong with a checkpoint folder, in words; an empty list if its manifest holds.

    No path is taken from the manifest: the files that are there are looked up in it. A file that it does not list is a
    problem too: it would mix two states.
    """
    file = os.path.join(folder, MANIFEST)
    if not os.path.lexists(file):
        return [f"there is no {MANIFEST}: the folder was not finished"]
    try:
        manifest = read_json(file)
        found = _listing(folder)
    except FileError as error:
        return [str(error)]
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is int and version > FORMAT:
        newer = f"was written by a newer petiole: format {_quoted(version)}, this one reads up to {FORMAT}"
        return [f"its {MANIFEST} {newer}"]
    listed = manifest.get("files") if version == FORMAT else None
    if not isinstance(listed, dict):
        return [f"its {MANIFEST} is damaged"]
    problems = [f"{_quoted(name)} is missing" for name in sorted(listed.keys() - found.keys())]
    problems += [f"{_quoted(name)} is not listed in {MANIFEST}" for name in sorted(found.keys() - listed.keys())]
    for name in sorted(listed.keys() & found.keys()):
        wanted = listed[name] if isinstance(listed[name], dict) else {}
        try:
            with _faults(found[name], "read"):
                fd = _open(found[name], os.O_RDONLY)
                try:
                    size = os.fstat(fd).st_size
                    if size != wanted.get("size"):
                        problems.append(f"{_quoted(name)} has {size} bytes, not {_quoted(wanted.get('size'))}")
                    elif _sum(fd)[1] != wanted.get("sha256"):
                        problems.append(f"{_quoted(name)} was changed: its digest differs")
                finally:
                    _close(fd)
        except FileError as error:
            problems.append(str(error))
    return problems


def newest_whole(parent: AnyPath, pattern: str = "checkpoint-*") -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint with the highest step whose manifest holds, and those passed over on the way, with the reason.

    Args:
        parent: the folder that holds the checkpoints; none there yet is no error.
        pattern: of their names, which end with the step number.
    """
    numbered: list[tuple[int, str]] = []
    skipped: list[tuple[Path, str]] = []
    if os.path.isdir(parent):
        with _faults(parent, "read"):
            for name in sorted(os.listdir(parent)):
                if fnmatch.fnmatchcase(name, pattern) and os.path.isdir(os.path.join(parent, name)):
                    if step := re.search("[0-9]+$", name):
                        numbered.append((int(step[0]), name))
                    else:
                        skipped.append((Path(parent, name), "its name does not end with a step number"))
    for _, name in sorted(numbered, reverse=True):
        problems = verify_manifest(Path(parent, name))
        if not problems:
            return Path(parent, name), skipped
        skipped.append(
            (
                Path(parent, name),
                "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""),
            )
        )
    return None, skipped


def _listing(folder: AnyPath) -> dict[str, str]:
    """The regular files under a folder by relative path with forward slashes; not the hidden ones, nor the manifest."""

    def fail(error: OSError) -> None:
        raise error

    found: dict[str, str] = {}
    with _faults(folder, "read"):
        for base, folders, names in os.walk(folder, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = os.path.join(base, name)
                relative = Path(os.path.relpath(file, folder)).as_posix()
                if not name.startswith(".") and relative != MANIFEST and os.path.isfile(file):
                    found[relative] = file
    return dict(sorted(found.items()))


def _sum(fd: int) -> tuple[int, str]:
    """Bytes read and their SHA-256."""
    size, total = 0, hashlib.sha256()
    while block := os.read(fd, 1 << 20):
        size += len(block)
        total.update(block)
    return size, total.hexdigest()


# --- which backbone ---------------------------------------------------------------------------------------------------

# What may differ between two loads of one backbone: where it came from, how it is run, what its head is for. Besides,
# every key that starts with an underscore (`_name_or_path`, `_attn_implementation`, …).
_VOLATILE = {
    *("transformers_version", "torch_dtype", "dtype", "attn_implementation", "use_cache"),
    *("architectures", "id2label", "label2id", "num_labels", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
}
_SAMPLE = 64


@torch.no_grad()
def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, Any]:
    """What tells one backbone from another: class, configuration, and names, shapes, dtypes and samples of its tensors.

    Take it before training: running statistics move even in a frozen backbone. Tied tensors count once. What petiole
    attached (a part of the name starts with "petiole") and buffers that no state dict holds do not count. On the meta
    device "values" is None.

    Args:
        model: the backbone.
        exclude: names of tensors that the adaptation changes or brings along: a trained head, biases trained in place.

    Returns:
        JSON values: "class"; "config", a digest, and "fields", a short digest of each of its fields; "tensors" and
        "elements", how many; "dtypes"; "layout", a digest of names and shapes; "values", a digest of the samples.
    """
    left_out = set(exclude)
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if any(part.startswith("petiole") for part in prefix.split(".")):
            continue
        kept = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None and not name.startswith("petiole"):
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
                tensors[id(tensor)] = tensor
    # A tensor with two names is one tensor: it is left out when either name is.
    own = sorted((min(known), tensors[key]) for key, known in names.items() if left_out.isdisjoint(known))

    layout, values = hashlib.sha256(), hashlib.sha256()
    dtypes: dict[str, int] = {}
    count = 0
    meta = False
    for name, tensor in own:
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
        count += tensor.numel()
        layout.update(f"{name}\0{tuple(tensor.shape)}\n".encode())
        values.update(f"{name}\0{dtype}\n".encode())
        for plain in _inner(tensor):
            meta = meta or plain.device.type == "meta"
            if not meta:
                values.update(_sample(plain))
    config = _configuration(model)
    return {
        "class": type(model).__name__,
        "config": None if config is None else hashlib.sha256(_canonical(config).encode()).hexdigest(),
        "fields": {
            key: hashlib.sha256(_canonical(value).encode()).hexdigest()[:8] for key, value in (config or {}).items()
        },
        "tensors": len(own),
        "elements": count,
        "dtypes": dtypes,
        "layout": layout.hexdigest(),
        "values": None if meta else values.hexdigest(),
    }


def same_backbone(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """How the backbone in a file and one's own differ, in words; an empty list if they are the same."""
    differences = []
    if saved.get("class") != own.get("class"):
        differences.append(f"the class is {_quoted(saved.get('class'))} in the file, {_quoted(own.get('class'))} here")
    if saved.get("config") != own.get("config"):
        theirs: Mapping[str, Any] = fields if isinstance(fields := saved.get("fields"), Mapping) else {}
        ours: Mapping[str, Any] = fields if isinstance(fields := own.get("fields"), Mapping) else {}
        other = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        shown = ", ".join(_quoted(key)[1:-1] for key in other[:8])
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        differences.append("the configuration differs" + (f": {shown}{more}" if other else ""))
    if any(saved.get(key) != own.get(key) for key in ("layout", "tensors", "elements")):
        sides = [
            f"{_quoted(side.get('tensors'))} tensors of {_quoted(side.get('elements'))} elements"
            for side in (saved, own)
        ]
        differences.append(f"names or shapes of tensors differ: {sides[0]} in the file, {sides[1]} here")
    elif saved.get("dtypes") != own.get("dtypes"):
        sides = [_quoted(side.get("dtypes")) for side in (saved, own)]
        differences.append(f"the dtypes differ: {sides[0]} in the file, {sides[1]} here")
    elif saved.get("values") != own.get("values") and None not in (saved.get("values", ""), own.get("values", "")):
        differences.append("the weights differ: same names and shapes, other values")
    return differences


def _configuration(model: nn.Module) -> dict[str, Any] | None:
    """The model's configuration without what is volatile, at any depth; None if it has none."""
    config = getattr(model, "config", None)
    as_dict = getattr(config, "to_dict", None)
    raw = as_dict() if callable(as_dict) else config
    if not isinstance(raw, Mapping):
        return None

    def steady(value: Any) -> Any:
        if isinstance(value, Mapping):
            pairs = ((str(key), item) for key, item in value.items())
            return {key: steady(item) for key, item in pairs if key not in _VOLATILE and not key.startswith("_")}
        if isinstance(value, (list, tuple)):
            return [steady(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(str(item) for item in value)
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        # No repr of anything else: it could hold an address.
        return str(value) if isinstance(value, (float, torch.dtype)) else type(value).__name__

    found: dict[str, Any] = steady(raw)
    return found


def _inner(tensor: Tensor) -> Sequence[Tensor]:
    """The plain tensors that make up a tensor: itself, or what a wrapper (a quantised weight) holds."""
    if hasattr(tensor, "full_tensor"):  # sharded over processes
        return [tensor.full_tensor()]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in _inner(getattr(tensor, name))]


def _sample(tensor: Tensor) -> bytes:
    """At most 64 values at a fixed stride. The stride is odd, so that a matrix is not read along one column only."""
    if tensor.layout != torch.strided:
        return str(tensor.layout).encode()
    plain = tensor.detach()
    flat = (plain.int_repr() if plain.is_quantized else plain).reshape(-1)
    stride = -(-flat.numel() // _SAMPLE) | 1
    return bytes(_bytes(flat[::stride].cpu().resolve_conj().resolve_neg().contiguous()))
