"""Downloads, against a server on the loopback that can break off, lie, and forget about ranges."""

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pit_core import download as module
from pit_core.cli import main
from pit_core.download import RELEASES, Release, download
from pit_core.errors import PitError

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
CONFIG = b"hidden_dim: 192\n"
HASH = hashlib.sha256(CONTENT).hexdigest()
GIT_HASH = hashlib.sha1(b"blob 16\0" + CONFIG).hexdigest()
WEIGHTS, SETTINGS = "/owner/toy/resolve/main/models/prior.ckpt", "/owner/toy/resolve/main/models/cfg.yaml"


@dataclass
class Hub:
    """What the server holds and how it misbehaves."""

    content: dict[str, bytes] = field(default_factory=lambda: {WEIGHTS: CONTENT, SETTINGS: CONFIG})
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)  # "METHOD path" -> for one answer each
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes, for one answer after the other
    seconds_per_block: float = 0.0
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests."""


def _serve(hub: Hub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            hub.log.append((self.command, self.path, self.headers.get("Range")))
            if statuses := hub.statuses.get(f"{self.command} {self.path}"):
                return self._end(statuses.pop(0), {})
            if self.path in hub.redirects:
                extra = hub.headers.get(self.path, {})
                return self._end(302, {"Location": hub.redirects[self.path], **extra})
            if self.path not in hub.content:
                return self._end(404, {})
            self._send(hub.content[self.path], body)

        def _send(self, content: bytes, body: bool) -> None:
            start = self._start() if body else 0
            if start and start >= len(content):
                return self._end(416, {})
            extra = {"Content-Length": str(len(content) - start), **hub.headers.get(self.path, {})}
            if start:
                extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._end(206 if start else 200, extra)
            if body:
                self._write(content[start:])

        def _start(self) -> int:
            asked = self.headers.get("Range") if hub.ranges else None
            return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0

        def _write(self, content: bytes) -> None:
            stop = hub.break_after.pop(0) if hub.break_after and len(content) > len(CONFIG) else len(content)
            for at in range(0, stop, 1 << 16):
                self.wfile.write(content[at : min(at + (1 << 16), stop)])
                time.sleep(hub.seconds_per_block)

        def _end(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            headers.setdefault("Content-Length", "0")
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = {"prior.ckpt": "models/prior.ckpt", "cfg.yaml": "models/cfg.yaml"}
    monkeypatch.setitem(RELEASES, "toy", Release("A toy prior", "owner/toy", files))
    monkeypatch.setitem(RELEASES, "toy-folder", Release("Toy directions", "owner/toy", folder="directions"))
    hub = Hub(headers={WEIGHTS: {"X-Linked-Etag": f'"{HASH}"', "X-Linked-Size": str(len(CONTENT))}})
    server = _serve(hub)
    yield hub
    server.shutdown()
    server.server_close()


def _fetch(hub: Hub, into: Path, name: str = "toy", retries: int = 1) -> list[Path]:
    return download(name, into, base_url=hub.url, confirm=lambda _: True, progress=False, retries=retries)


def _gets(hub: Hub, path: str = WEIGHTS) -> list[str | None]:
    return [asked for method, at, asked in hub.log if method == "GET" and at == path]


def _part(into: Path, content: bytes) -> Path:
    part = into / "toy" / "prior.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def test_fetches_every_file_of_a_release_into_its_own_folder(hub: Hub, tmp_path: Path) -> None:
    weights, settings = _fetch(hub, tmp_path)
    assert weights == tmp_path / "toy" / "prior.ckpt" and weights.read_bytes() == CONTENT
    assert settings == tmp_path / "toy" / "cfg.yaml" and settings.read_bytes() == CONFIG
    assert sorted(path.name for path in weights.parent.iterdir()) == ["cfg.yaml", "prior.ckpt"]


def test_says_what_it_will_fetch_how_big_it_is_and_from_where(hub: Hub, tmp_path: Path) -> None:
    plans: list[str] = []
    assert download("toy", tmp_path, base_url=hub.url, confirm=lambda plan: bool(plans.append(plan))) == []
    for said in (
        "A toy prior",
        f"{hub.url}/owner/toy",
        "prior.ckpt  1.02 MB",
        "cfg.yaml  16 bytes",
        "in all",
    ):
        assert said in plans[0]
    assert not list(tmp_path.iterdir()), "a no leaves nothing behind"
    assert not _gets(hub)


def test_a_pinned_release_is_asked_for_by_its_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"prior.ckpt": "models/prior.ckpt"}
    monkeypatch.setitem(RELEASES, "toy", Release("Toy", "owner/toy", files, revision="c0ffee"))
    hub.content = {WEIGHTS.replace("main", "c0ffee"): CONTENT}
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    monkeypatch.setitem(
        RELEASES, "toy-folder", Release("Toy", "owner/toy", folder="directions", revision="c0ffee")
    )
    listing = "/api/models/owner/toy/tree/c0ffee/directions?recursive=true"
    entry = {"type": "file", "path": "directions/note.txt", "size": len(CONFIG)}
    hub.content = {
        listing: json.dumps([entry]).encode(),
        "/owner/toy/resolve/c0ffee/directions/note.txt": CONFIG,
    }
    assert _fetch(hub, tmp_path, "toy-folder")[0].read_bytes() == CONFIG


def test_a_recorded_checksum_holds_for_small_files_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"cfg.yaml": "models/cfg.yaml"}
    other = hashlib.sha256(b"hidden_dim: 191\n").hexdigest()
    for recorded in (other, hashlib.sha256(CONFIG).hexdigest()):
        monkeypatch.setitem(
            RELEASES, "toy", Release("Toy", "owner/toy", files, hashes={"cfg.yaml": recorded})
        )
        if recorded == other:
            with pytest.raises(PitError, match=f"arrived damaged .*not {other[:12]}"):
                _fetch(hub, tmp_path)
            assert not list((tmp_path / "toy").iterdir())
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONFIG


def test_a_server_that_announces_another_checksum_than_the_recorded_one_is_not_asked_for_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"prior.ckpt": "models/prior.ckpt"}
    release = Release("Toy", "owner/toy", files, hashes={"prior.ckpt": "0" * 64})
    monkeypatch.setitem(RELEASES, "toy", release)
    with pytest.raises(PitError, match="should have the SHA-256 000000000000... but the server offers"):
        _fetch(hub, tmp_path)
    assert not _gets(hub)


def test_every_fetched_files_checksum_is_told_with_what_it_was_compared_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def fetch(into: Path) -> None:
        download("toy", into, base_url=hub.url, confirm=lambda _: True, tell=told.append, progress=False)

    fetch(tmp_path / "a")
    settings = hashlib.sha256(CONFIG).hexdigest()
    assert told == [
        f"prior.ckpt: sha256 {HASH}, as announced by the server",
        f"cfg.yaml: sha256 {settings}, not checked: no checksum is known, so compare it with a copy that you "
        "trust",
    ]
    recorded = {"prior.ckpt": HASH, "cfg.yaml": settings}
    monkeypatch.setitem(RELEASES, "toy", replace(RELEASES["toy"], hashes=recorded))
    told.clear()
    fetch(tmp_path / "b")
    assert [line.rsplit(", ", 1)[1] for line in told] == ["as recorded", "as recorded"]
    fetch(tmp_path / "b")
    assert told[2:] == [line.replace(": ", ": here already, ") for line in told[:2]]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_a_small_file_is_checked_with_its_git_hash(hub: Hub, tmp_path: Path, header: str) -> None:
    """The Hub announces no SHA-256 of them."""
    told: list[str] = []
    hub.headers[SETTINGS] = {header: '"' + "0" * 40 + '"'}
    with pytest.raises(PitError, match=f"cfg.yaml arrived damaged .*git hash is {GIT_HASH[:12]}.*0000"):
        _fetch(hub, tmp_path)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["prior.ckpt"]
    hub.headers[SETTINGS] = {header: f'W/"{GIT_HASH}"'}
    download("toy", tmp_path, base_url=hub.url, confirm=lambda _: True, tell=told.append, progress=False)
    assert told[-1].endswith(", git hash as announced by the server")


def test_a_storages_etag_is_no_checksum(hub: Hub, tmp_path: Path) -> None:
    storage = Hub(content={"/blob": CONFIG}, headers={"/blob": {"ETag": "0" * 40}})
    server = _serve(storage)
    hub.redirects[SETTINGS] = f"{storage.url}/blob"
    assert _fetch(hub, tmp_path)[1].read_bytes() == CONFIG
    server.shutdown()
    server.server_close()


def test_files_that_are_there_are_held_against_the_recorded_checksum(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, settings = _fetch(hub, tmp_path)
    monkeypatch.setitem(RELEASES, "toy", replace(RELEASES["toy"], hashes={"prior.ckpt": HASH}))
    damaged = b"?" + CONTENT[1:]
    weights.write_bytes(damaged)
    settings.unlink()
    hub.log.clear()
    with pytest.raises(PitError, match="prior.ckpt' is here already, but damaged .*SHA-256.*delete it"):
        _fetch(hub, tmp_path)
    assert weights.read_bytes() == damaged and not settings.exists()
    assert not _gets(hub, SETTINGS), "nothing is fetched beside a damaged file"
    weights.unlink()
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT


def test_files_that_are_there_are_held_against_the_recorded_size(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = _fetch(hub, tmp_path)
    monkeypatch.setitem(RELEASES, "toy", replace(RELEASES["toy"], sizes={"prior.ckpt": len(CONTENT)}))
    _fetch(hub, tmp_path)
    weights.write_bytes(CONTENT[:-1])
    with pytest.raises(PitError, match="damaged or another file .it has 1023999 bytes, not 1024000"):
        _fetch(hub, tmp_path)


def _command(hub: Hub, into: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["download", "toy", "--into", str(into), "--server", hub.url, *more])
    return int(ended.value.code or 0)


def test_without_a_terminal_the_command_asks_for_yes(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(hub, tmp_path) == 2
    assert capsys.readouterr().err == (
        "pit: Nothing was downloaded: there is no terminal to ask on; add --yes to agree to it.\n"
    )
    assert not _gets(hub)
    assert _command(hub, tmp_path, "--yes") == 0
    out = capsys.readouterr().out
    assert f"prior.ckpt: sha256 {HASH}" in out
    assert str(tmp_path / "toy" / "cfg.yaml") in out


class Terminal(io.StringIO):
    """Somebody types this."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "code", "words"), [("n", 1, "Nothing was downloaded."), ("y", 0, "cfg.yaml")]
)
def test_the_command_does_as_it_is_told_on_a_terminal(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    assert _command(hub, tmp_path) == code
    assert words in capsys.readouterr().out.splitlines()[-1]
    assert bool(_gets(hub)) == (answer == "y")


def test_a_question_that_is_broken_off_is_an_interruption(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert _command(hub, tmp_path) == 130
    assert capsys.readouterr().err.endswith("pit: interrupted.\n")


def test_what_is_there_already_is_neither_fetched_nor_asked_about(hub: Hub, tmp_path: Path) -> None:
    first = _fetch(hub, tmp_path)
    hub.log.clear()
    assert download("toy", tmp_path, base_url=hub.url, confirm=lambda _: pytest.fail("asked")) == first
    assert not hub.log


def test_only_the_missing_file_is_fetched(hub: Hub, tmp_path: Path) -> None:
    _fetch(hub, tmp_path)[1].unlink()
    hub.log.clear()
    _fetch(hub, tmp_path)
    assert {path for _, path, _ in hub.log} == {SETTINGS}


def test_goes_on_by_itself_where_the_connection_broke(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = [300_000, 200_000]
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert _gets(hub) == [None, "bytes=300000-", "bytes=500000-"]


def test_a_second_call_resumes_what_the_first_left(hub: Hub, tmp_path: Path) -> None:
    hub.break_after = [300_000, 0]
    with pytest.raises(PitError, match="broke .*same command goes on"):
        _fetch(hub, tmp_path, retries=0)
    assert (tmp_path / "toy" / "prior.ckpt.part").stat().st_size == 300_000
    plans: list[str] = []
    download("toy", tmp_path, base_url=hub.url, confirm=lambda p: not plans.append(p), progress=False)
    assert "300 kB are here from an earlier attempt" in plans[0]
    assert (tmp_path / "toy" / "prior.ckpt").read_bytes() == CONTENT


def test_an_interrupted_process_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_per_block = 0.5
    script = (
        "import signal, sys; from pit_core.download import *\n"
        # A shell's background jobs are started with interrupts ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "RELEASES['toy'] = Release('Toy', 'owner/toy', {'prior.ckpt': 'models/prior.ckpt'})\n"
        "download('toy', sys.argv[1], base_url=sys.argv[2], confirm=lambda _: True)\n"
    )
    running = subprocess.Popen([sys.executable, "-c", script, tmp_path, hub.url], stderr=subprocess.DEVNULL)
    part = tmp_path / "toy" / "prior.ckpt.part"
    while running.poll() is None and not (part.is_file() and part.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) != 0
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    hub.seconds_per_block = 0
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert _gets(hub)[-1] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_over(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.break_after = [300_000]
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT


def test_a_complete_part_is_checked_and_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    _part(tmp_path, CONTENT)
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert not _gets(hub)


@pytest.mark.parametrize("left", [CONTENT[:1000] + b"?" * 1000, b"?" * len(CONTENT)])
def test_a_wrong_checksum_deletes_the_part(hub: Hub, tmp_path: Path, left: bytes) -> None:
    part = _part(tmp_path, left)
    with pytest.raises(PitError, match="arrived damaged .*SHA-256.* was deleted"):
        _fetch(hub, tmp_path)
    assert not part.exists() and not (tmp_path / "toy" / "prior.ckpt").exists()
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT, "the next attempt starts afresh"


def test_a_part_longer_than_the_file_starts_over(hub: Hub, tmp_path: Path) -> None:
    _part(tmp_path, CONTENT + b"more")
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("announced", [len(CONTENT) - 5000, len(CONTENT) + 5000])
def test_a_wrong_size_deletes_the_part(hub: Hub, tmp_path: Path, announced: int) -> None:
    hub.headers[WEIGHTS] = {"X-Linked-Size": str(announced)}
    with pytest.raises(PitError, match=f"it has .* bytes, not {announced}"):
        _fetch(hub, tmp_path)
    assert not list((tmp_path / "toy").glob("prior*"))


def test_a_changed_release_is_not_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"prior.ckpt": "models/prior.ckpt"}
    monkeypatch.setitem(RELEASES, "toy", Release("Toy", "owner/toy", files, sizes={"prior.ckpt": 12}))
    with pytest.raises(PitError, match="should be 12 bytes but the server offers 1024000"):
        _fetch(hub, tmp_path)
    assert not list(tmp_path.iterdir())


def test_size_and_checksum_come_from_the_answer_that_redirects_to_storage(hub: Hub, tmp_path: Path) -> None:
    storage = Hub(content={"/blob": CONTENT})
    server = _serve(storage)
    hub.redirects[WEIGHTS] = f"{storage.url}/blob"
    del hub.content[WEIGHTS]
    hub.break_after = []
    storage.break_after = [300_000]
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert storage.log == [("GET", "/blob", None), ("GET", "/blob", "bytes=300000-")], (
        "no HEAD to the storage"
    )
    hub.headers[WEIGHTS] = {}
    (tmp_path / "toy" / "prior.ckpt").unlink()
    storage.log.clear()
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert storage.log[0] == ("HEAD", "/blob", None), "asked where the redirect tells no size"
    server.shutdown()
    server.server_close()


def test_a_redirect_within_the_host_is_followed(hub: Hub, tmp_path: Path) -> None:
    hub.content["/moved"] = hub.content.pop(WEIGHTS)
    hub.redirects[WEIGHTS] = "/moved"
    hub.headers["/moved"] = hub.headers.pop(WEIGHTS)
    assert _fetch(hub, tmp_path)[0].read_bytes() == CONTENT
    assert ("HEAD", "/moved", None) in hub.log


def test_a_folder_release_takes_its_files_from_the_listing(hub: Hub, tmp_path: Path) -> None:
    lfs = {"type": "file", "path": "directions/cute/ip.pt", "size": len(CONTENT), "lfs": {"oid": HASH}}
    small = {"type": "file", "path": "directions/note.txt", "size": len(CONFIG), "oid": GIT_HASH}
    lfs["oid"] = "0" * 40  # of the note that stands for it
    listing = "/api/models/owner/toy/tree/main/directions?recursive=true"
    hub.content |= {
        listing: json.dumps([{"type": "directory", "path": "directions/cute"}, lfs, small]).encode(),
        "/owner/toy/resolve/main/directions/cute/ip.pt": CONTENT,
        "/owner/toy/resolve/main/directions/note.txt": CONFIG,
    }
    found = _fetch(hub, tmp_path, "toy-folder")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "toy-folder/cute/ip.pt",
        "toy-folder/note.txt",
    ]
    assert found[0].read_bytes() == CONTENT
    found[1].write_bytes(CONFIG[::-1])
    with pytest.raises(PitError, match="note.txt' is here already, but damaged .*git hash"):
        _fetch(hub, tmp_path, "toy-folder")


@pytest.mark.parametrize(
    "path", ["directions/../../x", "/etc/x", "directions/a\\b", "directions/.ssh", "C:x"]
)
def test_a_listing_cannot_name_files_outside_its_folder(hub: Hub, tmp_path: Path, path: str) -> None:
    listing = "/api/models/owner/toy/tree/main/directions?recursive=true"
    hub.content[listing] = json.dumps([{"type": "file", "path": path, "size": 1}]).encode()
    with pytest.raises(PitError, match="unsafe name"):
        _fetch(hub, tmp_path, "toy-folder")


@pytest.mark.parametrize("text", [b"<html>", b"{}", b'["x"]', b'[{"type": "file"}]', b"[]"])
def test_a_listing_that_is_none_is_named(hub: Hub, tmp_path: Path, text: bytes) -> None:
    hub.content["/api/models/owner/toy/tree/main/directions?recursive=true"] = text
    with pytest.raises(PitError, match="gave no list of files"):
        _fetch(hub, tmp_path, "toy-folder")


def test_a_busy_server_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.statuses[f"GET {WEIGHTS}"] = [503, 429]
    assert _fetch(hub, tmp_path, retries=2)[0].read_bytes() == CONTENT
    assert _gets(hub) == [None, None, None]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, "does not exist"),
        (401, "accept the terms"),
        (403, "accept the terms"),
        (503, "again later"),
    ],
)
def test_a_refusal_is_one_sentence(hub: Hub, tmp_path: Path, status: int, sentence: str) -> None:
    hub.statuses[f"HEAD {WEIGHTS}"] = [status]
    with pytest.raises(PitError, match=sentence) as raised:
        _fetch(hub, tmp_path)
    assert str(status) in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(PitError, match=r"127\.0\.0\.1:9 cannot be reached .*check the connection"):
        download("toys-prior", tmp_path, base_url="http://127.0.0.1:9", confirm=lambda _: True)


def test_an_unknown_name_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="no release named 'plush'.*characters-prior.*toys-prior"):
        download("plush", tmp_path, confirm=lambda _: True)


def test_too_small_a_disk_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PitError, match=r"needs 1\.02 MB, but the disk .* has 1 kB left"):
        _fetch(hub, tmp_path)
    assert not _gets(hub)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    _part(tmp_path, b"").unlink()
    (tmp_path / "toy" / "prior.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(PitError, match=r"disk of .* is full; make room"):
        _fetch(hub, tmp_path)


def test_a_target_that_is_no_folder_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("a file in the way")
    with pytest.raises(PitError, match="cannot be written"):
        _fetch(hub, tmp_path)


def test_every_release_names_a_repository_and_plain_local_paths() -> None:
    for name, release in RELEASES.items():
        assert name == name.lower() and release.about and release.repository.count("/") == 1
        assert bool(release.files) != bool(release.folder)
        assert release.sizes.keys() | release.hashes.keys() <= release.files.keys()
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in release.hashes.values())
        assert release.revision == "main" or re.fullmatch(r"[0-9a-f]{40}", release.revision)
        assert not any(".." in local or local.startswith("/") for local in release.files)
