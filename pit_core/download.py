"""Fetching the released files, when somebody asks for them on the command line and only then.

Says first what will be fetched, from where and how big it is. A download that was broken off goes on where it
stopped; a file appears under its name only when it is complete and its checksum holds: the one recorded here,
else the one that the server announces. Where neither exists, the line about the file says so. Files that are
there already are checked as well.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import PitError
from .files import NO_SPACE, sha256_of
from .runs import fingerprint

HUB = "https://huggingface.co"
TIMEOUT_SECONDS = 30.0
BLOCK_BYTES = 1 << 18
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Release:
    """Files that belong together: local path -> path in the repository, or a whole folder of it.

    revision: a commit, or "main" where none is known. sizes in bytes and hashes (SHA-256) are by local path,
    of the files where they are known for certain.
    """

    about: str
    repository: str
    files: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    revision: str = "main"
    sizes: Mapping[str, int] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)


def _prior(domain: str, folder: str) -> Release:
    return Release(
        about=f"IP-Prior for {domain}",
        repository="kfirgold99/Piece-it-Together",
        files={name: f"models/{folder}/{name}" for name in ("prior.ckpt", "cfg.yaml")},
        sizes={"prior.ckpt": 1_079_507_976},
    )


def _sdxl_settings() -> dict[str, str]:
    """What a diffusers folder holds besides weights: all that a single file of weights lacks."""
    names = ["model_index.json", "scheduler/scheduler_config.json"]
    names += [f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "unet", "vae")]
    for tokenizer in ("tokenizer", "tokenizer_2"):
        files = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
        names += [f"{tokenizer}/{file}" for file in files]
    return {name: name for name in names}


def _sdxl_files() -> dict[str, str]:
    """The diffusers folder in half precision, saved under the plain names that need no variant to load."""
    weights = {
        "text_encoder": "model",
        "text_encoder_2": "model",
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
    }
    halves = {
        f"{part}/{stem}.safetensors": f"{part}/{stem}.fp16.safetensors" for part, stem in weights.items()
    }
    return _sdxl_settings() | halves


# As several public lists of these files agree on them.
IP_ADAPTER_COMMIT = "018e402774aeeddd60609b4ecdb7e298259dc729"
SDXL_COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
MERGES = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
VOCABULARY = "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
SDXL_HASHES = {
    "model_index.json": "6d7b93508390ab91ac5bfbe4aeb4dc2d83f7bb1b05fb069d714b5b0c75f70d44",
    "scheduler/scheduler_config.json": "af3e45a949aff8b8341ab8b811429ec03fee857a700a1d9477363e4fff9666e2",
    "text_encoder/config.json": "39b8b2e4b1949e36969caa425b6c81c68bace99198dd9078ce05d16ad401fe7f",
    "text_encoder/model.safetensors": "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd",
    "text_encoder_2/config.json": "a892d1c3a69a7e9247a24de2bc1d5891e3109a54696e53be20093af671072c34",
    "text_encoder_2/model.safetensors": "ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4",
    "tokenizer/merges.txt": MERGES,
    "tokenizer/special_tokens_map.json": "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac",
    "tokenizer/tokenizer_config.json": "19d7b034cb0cc3ce9766c2231373ab8aa8991fc72e2c8f76558bfaae3de0d563",
    "tokenizer/vocab.json": VOCABULARY,
    "tokenizer_2/merges.txt": MERGES,
    "tokenizer_2/special_tokens_map.json": "f118ab3a983206e4f32583448de6bd6aae4ee21869135cef1f5848a753cdaab6",
    "tokenizer_2/tokenizer_config.json": "c9d23941f76a41cbd50eda9290f57be7828f0a7a677939e9ef181f7e12bd1bdf",
    "tokenizer_2/vocab.json": VOCABULARY,
    "unet/config.json": "30ebc70750223e59006f7f2b4e1e6c102570aa19a9c4ae3e1fbe7591332dbae6",
    "unet/diffusion_pytorch_model.safetensors": (
        "83e012a805b84c7ca28e5646747c90a243c65c8ba4f070e2d7ddc9d74661e139"
    ),
    "vae/config.json": "0b331c8ac22ded5f9997a144a575c1d113d6169aff262c353f39015bd24a6264",
    "vae/diffusion_pytorch_model.safetensors": (
        "bcb60880a46b63dea58e9bc591abe15f8350bde47b405f9c38f4be70c6161e68"
    ),
}

RELEASES: dict[str, Release] = {
    "characters-prior": _prior("fantasy characters", "characters_ckpt"),
    "products-prior": _prior("products", "products_ckpt"),
    "toys-prior": _prior("plush toys", "plush_ckpt"),
    "directions": Release(
        about="semantic directions in IP+ space",
        repository="kfirgold99/Piece-it-Together",
        folder="ip_space_edit_directions",
    ),
    "ip-adapter-plus-sdxl": Release(
        about="IP-Adapter Plus for SDXL",
        repository="h94/IP-Adapter",
        files={
            "ip-adapter-plus_sdxl_vit-h.safetensors": "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"
        },
        revision=IP_ADAPTER_COMMIT,
        hashes={
            "ip-adapter-plus_sdxl_vit-h.safetensors": (
                "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581"
            )
        },
    ),
    "image-encoder-vit-h": Release(
        about="CLIP ViT-H image encoder",
        repository="h94/IP-Adapter",
        files={name: f"models/image_encoder/{name}" for name in ("config.json", "model.safetensors")},
        revision=IP_ADAPTER_COMMIT,
        hashes={"model.safetensors": "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030"},
    ),
    "sdxl": Release(
        about="Stable Diffusion XL base 1.0 in half precision",
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        files=_sdxl_files(),
        revision=SDXL_COMMIT,
        hashes=SDXL_HASHES,
    ),
    "sdxl-config": Release(
        about="Settings and tokenizers of Stable Diffusion XL base 1.0, for SDXL in a single file",
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        files=_sdxl_settings(),
        revision=SDXL_COMMIT,
        hashes={name: SDXL_HASHES[name] for name in _sdxl_settings()},
    ),
}


SHA256, GIT_HASH = "SHA-256", "git hash"
KINDS = {64: SHA256, 40: GIT_HASH}  # by their number of hex digits
RECORDED, ANNOUNCED = "recorded", "announced by the server"


@dataclass(frozen=True)
class _Checksum:
    """What a file is held against: a SHA-256, or git's hash, which is what the Hub knows small files by.

    digest: hex digits. source: who says so.
    """

    kind: str
    digest: str
    source: str


@dataclass(frozen=True)
class _File:
    """One file of a release; size in bytes and checksum are None where neither we nor the server know."""

    target: Path
    path: str
    url: str
    size: int | None
    checksum: _Checksum | None

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")


def download(
    name: str,
    into: str | os.PathLike[str],
    *,
    confirm: Callable[[str], bool],
    tell: Callable[[str], object] = lambda _line: None,
    base_url: str = HUB,
    progress: bool = True,
    retries: int = 3,
) -> list[Path]:
    """Fetch the release `name` (a key of RELEASES) to the folder `into/name`; return the files' paths.

    `confirm` is shown the plan (files, sizes, source) and answers whether to go on; where it says no, the
    list is empty and nothing was written. Files that are there already are not fetched, but checked.
    `tell` is given a line for each file: its SHA-256, and with what that was compared, if with anything.
    `base_url` names another server with the Hub's layout; `retries` bounds the attempts in a row that bring
    nothing.

    Raises PitError, one sentence, for an unknown name, no network, a file that is not there, a full disk and
    a wrong size or checksum (a bad file that was fetched is removed, one that was there before is left). What
    arrived before an interruption stays in `*.part`.
    """
    release = _release(name)
    folder = Path(into) / name
    server = base_url.rstrip("/")
    with _network_errors(release, folder, server):
        files = _listed(release, folder, server) if release.folder else _asked_for(release, folder, server)
    missing = [file for file in files if not file.target.is_file()]
    _check_again([file for file in files if file not in missing], folder, tell, progress)
    if missing and not confirm(_plan(release, folder, server, missing)):
        return []
    _require_space(folder, missing)
    with _bar(name, missing, progress) as bar:
        for file in missing:
            with _network_errors(release, folder, server):
                checksum = _fetch(file, bar, retries)
            bar.clear()
            tell(f"{file.target.relative_to(folder).as_posix()}: {checksum}")
    return [file.target for file in files]


def _release(name: str) -> Release:
    if name not in RELEASES:
        raise PitError(f"There is no release named '{name}'; the names are {', '.join(sorted(RELEASES))}.")
    return RELEASES[name]


# what there is to fetch


def _asked_for(release: Release, folder: Path, server: str) -> list[_File]:
    """The release's files, with the size and checksum that the server announces for those not yet here."""
    files = []
    for local, path in release.files.items():
        url = _file_url(server, release, path)
        size, announced = (None, None) if (folder / local).is_file() else _announced(url)
        known, digest = release.sizes.get(local), release.hashes.get(local)
        if known is not None and size not in (None, known):
            _refuse_changed(url, f"be {known} bytes", size)
        recorded = _Checksum(SHA256, digest, RECORDED) if digest else None
        if recorded and announced and announced.kind == SHA256 and announced.digest != recorded.digest:
            _refuse_changed(url, f"have the SHA-256 {_short_of(recorded)}", _short_of(announced))
        files.append(_File(folder / local, path, url, known or size, recorded or announced))
    return files


def _refuse_changed(url: str, should: str, offered: object) -> NoReturn:
    raise PitError(
        f"{url} should {should} but the server offers {offered}: the released file was changed, "
        "so it was not fetched."
    )


def _listed(release: Release, folder: Path, server: str) -> list[_File]:
    """The files of the release's folder, as the server's listing gives them."""
    quoted = urllib.parse.quote(f"{release.repository}/tree/{release.revision}/{release.folder}")
    url = f"{server}/api/models/{quoted}?recursive=true"
    with urllib.request.urlopen(_request(url), timeout=TIMEOUT_SECONDS) as answer:
        text = answer.read()
    try:
        entries = [entry for entry in json.loads(text) if entry["type"] == "file"]
        files = [_listed_file(entry, release, folder, server) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        files = []
    if not files:
        raise PitError(f"{url} gave no list of files; the server's layout may have changed.")
    return files


def _listed_file(entry: Mapping[str, Any], release: Release, folder: Path, server: str) -> _File:
    path = str(entry["path"])
    local = path.removeprefix(f"{release.folder}/")
    # The listing comes from outside: only plain names below the folder are accepted.
    if not all(re.fullmatch(r"\w[\w .,()+=-]*", piece) for piece in local.split("/")):
        raise PitError(f"The server lists a file with an unsafe name ({path[:80]!r}); nothing was fetched.")
    # A large file's own oid is that of the note which stands for it in the repository.
    checksum = _checksum_in(str((entry.get("lfs") or entry).get("oid", "")))
    return _File(folder / local, path, _file_url(server, release, path), int(entry["size"]), checksum)


def _file_url(server: str, release: Release, path: str) -> str:
    return f"{server}/{release.repository}/resolve/{release.revision}/{urllib.parse.quote(path)}"


def _announced(url: str) -> tuple[int | None, _Checksum | None]:
    """Size and checksum of the file behind `url`, as far as the server tells them.

    The Hub describes a large file in the answer that redirects to its storage, so that one is read where it
    exists; the storage itself may refuse to be asked without downloading, and its ETag may mean anything.
    """
    headers = _head(url, _SameHost())
    checksum = _checksum_in(headers.get("X-Linked-Etag") or headers.get("ETag") or "")
    if headers.get("X-Linked-Size") is None and headers.get("Location") is not None:
        headers = _head(url, _AnyHost())
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    return (int(size) if size and size.isdigit() else None), checksum


def _head(url: str, redirects: _AnyHost) -> Message:
    try:
        with urllib.request.build_opener(redirects).open(
            _request(url, "HEAD"), timeout=TIMEOUT_SECONDS
        ) as answer:
            return answer.headers
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            return error.headers
        raise


class _AnyHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects and still asks for the headers alone, which the standard handler forgets."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            following.method = req.get_method()
        return following


class _SameHost(_AnyHost):
    """Follows redirects within one host; one that leads elsewhere is the answer (an HTTPError)."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checksum_in(etag: str) -> _Checksum | None:
    plain = etag.strip().removeprefix("W/").strip('"').removeprefix("sha256:").lower()
    kind = KINDS.get(len(plain)) if re.fullmatch("[0-9a-f]+", plain) else None
    return _Checksum(kind, plain, ANNOUNCED) if kind else None


def _request(url: str, method: str = "GET", start: int = 0) -> urllib.request.Request:
    headers = {"User-Agent": "piece-it-together", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.Request(url, headers=headers, method=method)


def _plan(release: Release, folder: Path, server: str, missing: list[_File]) -> str:
    lines = [
        f"{release.about}, from {server}/{release.repository} (its terms are on that page)",
        f"to {folder}:",
    ]
    lines += [f"  {file.target.relative_to(folder).as_posix()}  {_readable(file.size)}" for file in missing]
    lines.append(f"{_readable(_total(missing))} in all")
    here = _already_here(missing)
    if here:
        lines[-1] += f", of which {_readable(here)} are here from an earlier attempt"
    return "\n".join(lines)


def _total(files: list[_File]) -> int | None:
    sizes = [file.size for file in files if file.size is not None]
    return sum(sizes) if len(sizes) == len(files) else None


def _already_here(files: list[_File]) -> int:
    return sum(_length(file.part) for file in files)


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _readable(size: int | None) -> str:
    if size is None:
        return "of unknown size"
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.3g} {unit}"


def _require_space(folder: Path, missing: list[_File]) -> None:
    needed = sum(file.size or 0 for file in missing) - _already_here(missing)
    places = (folder.absolute(), *folder.absolute().parents)
    there = next((place for place in places if place.exists()), None)
    if there is None:  # a drive that is not there
        raise PitError(f"'{folder}' cannot be written to; choose another folder with --into.")
    free = shutil.disk_usage(there).free
    if needed > free:
        raise PitError(
            f"The download needs {_readable(needed)}, but the disk of {there} has {_readable(free)} left; "
            "make room or choose another folder."
        )


# fetching


def _fetch(file: _File, bar: Any, retries: int) -> str:
    """Bring one file: append to its part until it is whole, check it, name it; say how it was checked."""
    file.target.parent.mkdir(parents=True, exist_ok=True)
    bar.update(_length(file.part))
    failures = 0
    while True:
        before = _length(file.part)
        try:
            _append(file, bar)
            break
        except NETWORK_ERRORS as error:
            if isinstance(error, urllib.error.HTTPError) and not _may_pass(error.code):
                raise
            failures = 0 if _length(file.part) > before else failures + 1
            if failures > retries:
                raise
            time.sleep(max(0, failures - 1))
    sha256 = sha256_of(file.part)
    difference = _difference(file, file.part, sha256)
    if difference:
        file.part.unlink()
        raise PitError(
            f"{file.target.name} arrived damaged ({difference}) and was deleted; run the same command again."
        )
    os.replace(file.part, file.target)
    return _said(file, sha256)


def _may_pass(code: int) -> bool:
    return code >= 500 or code == http.client.TOO_MANY_REQUESTS


def _append(file: _File, bar: Any) -> None:
    """Add to the part what is missing, from the start where the server cannot continue."""
    start = _length(file.part)
    if start and start == file.size:
        return
    with _open_from(file.url, start) as answer:
        continues = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not continues:
            bar.update(-start)
        with file.part.open("ab" if continues else "wb") as out:
            for block in _blocks(answer):
                out.write(block)
                bar.update(len(block))
                if file.size is not None and out.tell() > file.size:
                    return  # more than was announced: the check says so
            left = answer.length if answer.length is not None else (file.size or 0) - out.tell()
    if left > 0:
        raise ConnectionError("it was closed early")


def _open_from(url: str, start: int) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(_request(url, start=start), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return urllib.request.urlopen(_request(url), timeout=TIMEOUT_SECONDS)


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What comes, block by block; a failure is a ConnectionError, so that it is not taken for the disk's."""
    while True:
        try:
            block = answer.read1(BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(_short(error)) from error
        if not block:
            return
        yield block


# checking


def _check_again(files: list[_File], folder: Path, tell: Callable[[str], object], progress: bool) -> None:
    """Hold files that are there already against what is known of them. Raises PitError for a difference.

    Large ones are read only once, until they change.
    """
    with _bar("checking", files, progress) as bar:
        for file in files:
            name = file.target.relative_to(folder).as_posix()
            sha256 = fingerprint(file.target)
            difference = _difference(file, file.target, sha256)
            if difference:
                raise PitError(
                    f"'{file.target}' is here already, but damaged or another file ({difference}); delete it "
                    "or move it away, then run the same command again."
                )
            bar.update(_length(file.target))
            bar.clear()
            tell(f"{name}: here already, {_said(file, sha256)}")


def _difference(file: _File, path: Path, sha256: str) -> str | None:
    """How `path`, with its SHA-256, differs from what is known of the file."""
    size = _length(path)
    if file.size is not None and size != file.size:
        return f"it has {size} bytes, not {file.size}"
    if file.checksum is None:
        return None
    kind = file.checksum.kind
    found = replace(file.checksum, digest=sha256 if kind == SHA256 else _git_hash(path))
    if found == file.checksum:
        return None
    return f"its {kind} is {_short_of(found)}, not {_short_of(file.checksum)}"


def _short_of(checksum: _Checksum) -> str:
    return f"{checksum.digest[:12]}..."


def _git_hash(path: Path) -> str:
    """SHA-1 over the file with its length before it, as git names what it stores."""
    content = path.read_bytes()  # the Hub keeps files over 10 MB elsewhere, under their SHA-256
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _said(file: _File, sha256: str) -> str:
    """What is known of a checked file."""
    if file.checksum is None:
        return f"sha256 {sha256}, not checked: no checksum is known, so compare it with a copy that you trust"
    kind = f"{file.checksum.kind} " if file.checksum.kind != SHA256 else ""
    return f"sha256 {sha256}, {kind}as {file.checksum.source}"


@contextmanager
def _bar(name: str, files: list[_File], progress: bool) -> Iterator[Any]:
    from tqdm import tqdm  # not needed to look things up

    with tqdm(
        desc=name,
        total=_total(files),
        unit="B",
        unit_scale=True,
        disable=None if progress and files else True,  # None: only where a terminal shows it
    ) as bar:
        yield bar


@contextmanager
def _network_errors(release: Release, folder: Path, server: str) -> Iterator[None]:
    """Turn what can go wrong on the way into one sentence each."""
    page = f"{server}/{release.repository}"
    try:
        yield
    except urllib.error.HTTPError as error:
        raise PitError(_http_message(error, page, folder)) from error
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        raise PitError(_unreachable_message(server, folder, reason)) from error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise PitError(
                f"The disk of {folder} is full; make room and run the same command again."
            ) from error
        raise PitError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _http_message(error: urllib.error.HTTPError, page: str, folder: Path) -> str:
    if error.code in (401, 403):
        return (
            f"{error.url} is not open to everybody ({error.code}): accept the terms on {page} in a browser, "
            f"fetch the files there and put them into {folder}."
        )
    if error.code == 404:
        return f"{error.url} does not exist (404): the file may have been moved; look for it on {page}."
    return (
        f"{error.url} cannot be fetched now ({error.code} {error.reason}); run the same command again later."
    )


def _unreachable_message(server: str, folder: Path, reason: object) -> str:
    host = urllib.parse.urlsplit(server).netloc
    what = _short(reason)
    if folder.is_dir() and any(folder.rglob("*.part")):
        return f"The connection to {host} broke ({what}); what arrived is kept, and the same command goes on."
    return f"{host} cannot be reached ({what}); check the connection and run the same command again."


def _short(reason: object) -> str:
    if isinstance(reason, socket.gaierror):
        return "its name is not known, so there is probably no network"
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return str(text)[:120].rstrip(".")
