"""Safe reading and atomic writing of checkpoints, directions and manifests.

A file from the internet is untrusted: pickles load with `weights_only=True`, safetensors headers are
checked before the library sees them, and what is wrong with a file is said in one sentence. A file that we
write is complete or absent, never half.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import PitError

MAX_HEADER_BYTES = 32 << 20  # real headers stay below 2 MB; the library itself would take 100 MB
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]')  # the last are no characters on their own
RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{d}{n}" for d in ("COM", "LPT") for n in range(10)
}
MAX_NESTING = 32
MAX_ENTRIES = 200_000
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC), 112}  # 112: Windows' disk full


# reading


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a weight file: safetensors, or a torch pickle (.bin, .pt, .ckpt, .pth) without running its code.

    The format is told by the file's content, so a wrong suffix does no harm. Nested dicts are flattened with
    dots (`{image_proj: {latents}}` -> `image_proj.latents`), a bare tensor becomes `{"tensor": t}`. Text,
    numbers and booleans that stand beside the tensors are returned as metadata, as strings (JSON for what was
    not a string). Tensors are on the CPU and own their memory.

    Raises PitError for a file that is missing, a directory, empty, truncated, a web page, a git-lfs pointer,
    a pickle with code, or otherwise not a weight file.
    """
    path = existing_file(path)
    start = _first_bytes(path)
    _refuse_what_is_no_weight_file(path, start)
    if start[8:9] == b"{":
        return _load_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _load_pickle(path)
    raise PitError(
        f"'{path.name}' is neither a safetensors file nor a torch checkpoint; "
        "it is probably damaged or of another kind, so fetch it again."
    )


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path, if a file is there; else PitError that names the most similar file in its folder."""
    path = Path(path)
    try:
        if path.is_dir():
            raise PitError(f"'{path}' is a folder, but one file was expected; name the file inside it.")
        if path.is_file():
            return path
        if path.exists():
            raise PitError(f"'{path}' is not an ordinary file.")
    except (OSError, ValueError) as error:  # a name too long for the disk, a NUL in the name, no permission
        raise PitError(f"'{str(path)[:200]!s}' cannot be looked up: {error}.") from error
    raise PitError(f"There is no file '{path}'{_suggestion(path)}.")


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of `name` below `folder`, for names that come from a workflow or another stranger.

    Subfolders with forward slashes are fine. Raises PitError for whatever could lead elsewhere or means
    something else on another system: `..`, absolute paths, `~`, backslashes, drive letters, control
    characters, Windows' reserved names, and links that leave the folder.
    """
    for part in name.split("/"):
        stem = part.partition(".")[0].rstrip().upper()
        if not part or len(part.encode("utf-8", "surrogatepass")) > 200 or part[0] == "~" or part[-1] in ". ":
            raise PitError(
                f"{name[:100]!r} is not a usable name; take a plain one without '..', '~' or '//'."
            )
        if FORBIDDEN.search(part) or stem in RESERVED:
            raise PitError(
                f"{name[:100]!r} holds characters or words that file names cannot have everywhere."
            )
    root = os.path.realpath(folder)
    path = Path(os.path.realpath(os.path.join(root, name)))
    if not path.is_relative_to(root):
        raise PitError(f"'{name[:100]}' leads out of the folder '{root}'; name a file inside it.")
    return path


def _suggestion(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; its folder '{folder}' does not exist either"
    try:
        names = {entry.name.lower(): entry.name for entry in folder.iterdir()}
    except OSError:
        return ""
    similar = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.6)
    if not similar:
        return ""
    hint = " (upper and lower case differ)" if similar[0] == path.name.lower() else ""
    return f"; the most similar one in its folder is '{names[similar[0]]}'{hint}"


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise PitError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _refuse_what_is_no_weight_file(path: Path, start: bytes) -> None:
    if not start:
        raise PitError(f"'{path.name}' is empty; its download probably failed, so fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise PitError(
            f"'{path.name}' is a git-lfs pointer, not the weights; run 'git lfs pull' or download it again."
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise PitError(
            f"'{path.name}' is a web page, not weights; download it again from the file's own link."
        )


def _load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    metadata = _checked_header(path)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for key in file.keys():
                # A clone, because the original is a view of the file on disk: it would change, or crash the
                # process, when somebody overwrites the file.
                tensors[key] = file.get_tensor(key).clone()
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise PitError(f"'{path.name}' is damaged ({_brief(error)}); fetch it again.") from error
    return tensors, metadata


def _checked_header(path: Path) -> dict[str, str]:
    """The header's metadata, after checks that the safetensors library leaves out or words badly."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise PitError(
                    f"'{path.name}' claims a header of {length} bytes, more than any real one has "
                    f"({MAX_HEADER_BYTES}); it is damaged or hostile."
                )
            raw = file.read(length)
    except OSError as error:
        raise PitError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    if len(raw) < length:
        _truncated(path, 8 + length, size)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        ends = [_end_offset(entry) for key, entry in header.items() if key != "__metadata__"]
        metadata = {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}
    except KeyError as error:
        raise PitError(f"'{path.name}' holds '{error.args[0]}' twice; it is damaged or hostile.") from error
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise PitError(f"'{path.name}' has a damaged safetensors header; fetch it again.") from error
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        _truncated(path, needed, size)
    return metadata


def _end_offset(entry: dict[str, Any]) -> int:
    if "data_offsets" not in entry:
        raise ValueError("a tensor without data_offsets")
    return int(entry["data_offsets"][1])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key[:100])
        found[key] = value
    return found


def _truncated(path: Path, needed: int, size: int) -> NoReturn:
    raise PitError(f"'{path.name}' is cut short: {size} of {needed} bytes are there; fetch it again.")


def _load_pickle(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:  # given a path, torch would go by its suffix
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PitError(_pickle_message(path, error)) from error
    except Exception as error:  # torch has no common type for broken archives
        raise PitError(
            f"'{path.name}' is a damaged torch checkpoint ({_brief(error)}); fetch it again."
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    if isinstance(loaded, torch.Tensor):
        loaded = {"tensor": loaded}
    for count, (key, leaf) in enumerate(_leaves(loaded, "", path, depth=0)):
        if count >= MAX_ENTRIES:
            raise PitError(f"'{path.name}' holds more than {MAX_ENTRIES} entries; it is damaged or hostile.")
        if isinstance(leaf, torch.Tensor):
            if key in tensors:
                raise PitError(f"'{path.name}' holds the key '{key[:100]}' twice; it is damaged or hostile.")
            tensors[key] = _plain_tensor(key, leaf, path)
        elif isinstance(leaf, str | int | float | bool):
            metadata[key] = leaf if isinstance(leaf, str) else json.dumps(leaf)
    return tensors, metadata


def _plain_tensor(key: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise PitError(
            f"'{path.name}' stores '{key[:100]}' as a sparse or empty shell; plain tensors are needed."
        )
    if tensor.nbytes > path.stat().st_size:  # a few bytes that are shown as terabytes by a stride of 0
        raise PitError(f"'{path.name}' holds '{key[:100]}', larger than the file; it is damaged or hostile.")
    return tensor


def _leaves(value: Any, prefix: str, path: Path, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_NESTING:
        raise PitError(f"'{path.name}' is nested deeper than {MAX_NESTING} levels; it is damaged or hostile.")
    if isinstance(value, Mapping):
        entries: Any = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        yield prefix, value
        return
    for key, child in entries:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key), path, depth + 1)


def _pickle_message(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f"Python objects ({named.group(1)})" if named else "more than plain tensors"
    return (
        f"'{path.name}' is a pickle that holds {what}; loading it could run code, so it was not opened; "
        "use a .safetensors file or convert it with software that you trust."
    )


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:150].rstrip(".")


# writing


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a safetensors file atomically: the old file stays until the new one is complete on disk.

    Tensors may be on any device, strided, or share memory. Metadata values that are not strings are stored as
    JSON. Missing folders are made. Raises PitError when the place cannot be written or the disk is full.
    """
    ready = _separate_copies(tensors)
    text = {key: v if isinstance(v, str) else json.dumps(v) for key, v in (metadata or {}).items()}
    with replacing(path) as temporary:
        try:
            save_file(ready, str(temporary), metadata=text)
        except SafetensorError as error:
            raise _as_os_error(error) from error


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text with plain newlines, completely or not at all."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes its place when the block succeeds.

    When it fails the temporary file is removed and `path` is as before. A link stays a link. Raises PitError
    for a read-only target and a full disk.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        _refuse_unwritable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(
            stat.S_IMODE(mode)
        )  # the safetensors library makes files that only their owner can read
        _flush(temporary)
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise PitError(_write_message(target, error)) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _separate_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, cloned where two of them, or one and something else, share a memory block."""
    seen: set[int] = set()
    ready = {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise PitError(f"'{key}' is a sparse tensor, which safetensors cannot hold; make it dense first.")
        plain = tensor.detach().cpu().contiguous()
        block = plain.untyped_storage()
        if block.data_ptr() in seen or block.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[key] = plain
    return ready


def _refuse_unwritable(target: Path) -> None:
    if target.is_dir():
        raise PitError(f"'{target}' is a folder; name a file inside it to write to.")
    # The mode bits, not os.access: an administrator's write-protected file is protected on purpose.
    if target.exists() and not (target.stat().st_mode & 0o222 and os.access(target, os.W_OK)):
        raise PitError(f"'{target}' is write-protected; choose another name or lift the protection.")


def _as_os_error(error: SafetensorError) -> Exception:
    """The system's error that the safetensors library reports only as text."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), str(error)) if code else PitError(f"Saving failed: {_brief(error)}.")


def _write_message(target: Path, error: OSError) -> str:
    if error.errno in NO_SPACE:
        return f"The disk is full or at its limit: '{target}' was not written; make room and try again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"'{target}' cannot be written (no permission, or in use); choose another folder."
    return f"'{target}' cannot be written: {error.strerror or error}."


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the new name itself durable; only POSIX can, and some network disks cannot."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


# checking


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as 64 hex digits. Raises PitError when it cannot be read."""
    path = existing_file(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise PitError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers: equal content, equal hash, in any kind of file."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def common_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The float type that holds all of them; 8-bit floats, which layers cannot compute in, count as fp16."""
    found = {torch.float16 if t.element_size() == 1 else t.dtype for t in tensors.values()}
    return reduce(torch.promote_types, found)


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise PitError when a tensor holds NaN or infinity; `what` names the file or the object."""
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise PitError(f"{what} holds NaN or infinite numbers ({_some(bad)}); it is broken, fetch it again.")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 cannot be compared
        tensor = tensor.float()
    lowest, highest = tensor.aminmax()  # NaN if there is one; forty times as fast as isfinite on every number
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def check_shapes(
    expected: Mapping[str, Sequence[int]], tensors: Mapping[str, torch.Tensor], what: str
) -> None:
    """Raise PitError unless `tensors` has exactly the expected keys and shapes; lists some that differ."""
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    wrong = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != tuple(shape)
    ]
    found = [
        f"{name}: {_some(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if keys
    ]
    if found:
        raise PitError(f"{what} does not have the expected tensors ({'; '.join(found)}).")


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(name[:100] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
