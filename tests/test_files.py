"""Weight files under attack: everything that downloads, disks and strangers do to them."""

import argparse
import errno
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pit_core.files as files
from pit_core.errors import PitError
from pit_core.files import (
    check_finite,
    check_shapes,
    common_dtype,
    existing_file,
    hash_tensors,
    inside,
    load_tensors,
    replacing,
    save_tensors,
    sha256_of,
    write_bytes_atomic,
    write_text_atomic,
)

posix = pytest.mark.skipif(os.name != "posix", reason="uses POSIX pipes, users or limits")


def good(path):
    save_file(
        {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.float16)}, path, {"k": "v"}
    )
    return path


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(path, message):
    with pytest.raises(PitError, match=message) as caught:
        load_tensors(path)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


# reading


def test_safetensors_come_back_with_their_metadata(tmp_path):
    tensors, metadata = load_tensors(good(tmp_path / "x.safetensors"))
    assert torch.equal(tensors["a"], torch.arange(12.0).reshape(3, 4)) and tensors["b"].dtype == torch.float16
    assert metadata == {"k": "v"}


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    path = good(tmp_path / "x.safetensors")
    tensors, _ = load_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensors["a"], torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("suffix", ["bin", "pt", "ckpt", "pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_nested_pickles_are_flattened_with_dots(tmp_path, suffix, zipped):
    nested = {
        "image_proj": OrderedDict(latents=torch.ones(1, 2)),
        "ip_adapter": {"1.to_k_ip.weight": torch.zeros(3)},
        "state": {0: {"m": torch.nn.Parameter(torch.ones(1))}},
        "list": [torch.ones(2), torch.zeros(2)],
        "step": 7,
        "lr": 0.5,
        "done": True,
        "name": "x",
        "none": None,
    }
    path = tmp_path / f"x.{suffix}"
    torch.save(nested, path, _use_new_zipfile_serialization=zipped)
    tensors, metadata = load_tensors(path)
    expected = {"image_proj.latents", "ip_adapter.1.to_k_ip.weight", "state.0.m", "list.0", "list.1"}
    assert tensors.keys() == expected
    assert not tensors["state.0.m"].requires_grad and type(tensors["state.0.m"]) is torch.Tensor
    assert metadata == {"step": "7", "lr": "0.5", "done": "true", "name": "x"}


def test_a_bare_tensor_is_named_tensor(tmp_path):
    torch.save(torch.arange(3), tmp_path / "direction.pt")
    assert torch.equal(load_tensors(tmp_path / "direction.pt")[0]["tensor"], torch.arange(3))


def test_the_content_decides_not_the_suffix(tmp_path):
    good(tmp_path / "x.bin")
    assert "a" in load_tensors(tmp_path / "x.bin")[0]
    torch.save({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "a" in load_tensors(str(tmp_path / "x.safetensors"))[0]


def test_missing_files_get_a_suggestion(tmp_path):
    good(tmp_path / "ip-adapter-plus_sdxl.safetensors")
    assert "most similar one in its folder is 'ip-adapter-plus_sdxl.safetensors'" in refused(
        tmp_path / "ip_adapter_plus.safetensors", "no file"
    )
    assert "upper and lower case" in refused(tmp_path / "IP-Adapter-Plus_SDXL.safetensors", "no file")
    assert "most similar" not in refused(tmp_path / "zzz.bin", "no file")
    refused(tmp_path / "nowhere" / "x.bin", "its folder .* does not exist")
    refused("", "folder|no file")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_impossible_names_are_no_crash(tmp_path, name):
    with pytest.raises(PitError):
        load_tensors(os.path.join(str(tmp_path), name))


@posix
def test_folders_and_pipes_are_not_files(tmp_path):
    refused(tmp_path, "is a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not an ordinary file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Not found", "is a web page"),
        (b"\xef\xbb\xbf\n  <HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
        (b"Entry not found", "neither a safetensors file nor a torch checkpoint"),
        (b"\0" * 4096, "neither"),
        (b"GGUF\3\0\0\0" + b"\0" * 100, "neither"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "neither"),
        (b"PK\x03\x04", "damaged torch checkpoint"),
        (b"PK\x03\x04" + b"\0" * 2000, "damaged torch checkpoint"),
        (b"\x80\x02", "damaged torch checkpoint|pickle"),
        (b"\x80\x02}q\x00.", "damaged torch checkpoint|pickle"),
    ],
)
def test_what_is_no_weight_file_is_named(tmp_path, content, message):
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, message)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_recognised(tmp_path, keep):
    good(tmp_path / "x.safetensors")
    torch.save({"a": torch.randn(5000)}, tmp_path / "x.bin")
    for name, message in (("x.safetensors", r"cut short: \d+ of \d+ bytes|neither"), ("x.bin", "damaged")):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
        refused(tmp_path / name, message)


class Code:
    def __reduce__(self):
        return (os.system, ("touch pickle-ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_pickles_with_code_are_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    if how == "plain":
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": Code()}))
    else:
        torch.save({"a": Code()}, "x.ckpt", _use_new_zipfile_serialization=how == "zip")
    refused(tmp_path / "x.ckpt", "loading it could run code")
    assert not (tmp_path / "pickle-ran").exists()


def test_objects_in_a_pickle_are_named(tmp_path):
    torch.save({"config": argparse.Namespace(lr=1), "a": torch.ones(1)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", r"Python objects \(argparse\.Namespace\)")


def test_an_archive_that_is_no_checkpoint_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(tmp_path / "x.bin", "damaged torch checkpoint")


def test_containers_that_contain_themselves_or_explode_end(tmp_path, monkeypatch):
    loop = {}
    loop["self"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    refused(tmp_path / "loop.pt", "nested deeper than")
    monkeypatch.setattr(files, "MAX_ENTRIES", 1000)
    laughs = [None] * 10
    for _ in range(20):
        laughs = [laughs] * 10
    torch.save(laughs, tmp_path / "laughs.pt")
    refused(tmp_path / "laughs.pt", "more than 1000 entries")


def test_pickled_tensors_larger_than_their_file_or_without_numbers_are_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "larger than the file")
    torch.save({"a": torch.ones(3, 3).to_sparse()}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "sparse or empty shell")
    torch.save({"a": torch.ones(3, device="meta")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "sparse or empty shell")


def test_pickled_keys_that_collide_after_flattening_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "holds the key 'a.b' twice")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "holds 'a' twice",
        ),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "holds 'dtype' twice"),
        ({"a": entry([2], 0, 4)}, "is damaged"),
        ({"a": entry([1], 4, 8)}, "is damaged|cut short"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, "is damaged"),
        ({"a": entry([1], 0, 4, "F99")}, "is damaged"),
        ({"a": entry([-1], 0, 4)}, "is damaged"),
        ({"a": entry([1 << 62, 8], 0, 4)}, "is damaged"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}, "damaged"),
        ({"a": 3}, "damaged safetensors header"),
        ({"__metadata__": [1]}, "damaged safetensors header"),
        (b"{" * 100000, "damaged safetensors header"),
        (b'{"a":' * 100000, "damaged safetensors header"),
        (b'{"\xff\xfe": 1}', "damaged safetensors header"),
        (b"{nonsense}", "damaged safetensors header"),
    ],
)
def test_hostile_headers_are_one_sentence(tmp_path, header, message):
    refused(raw(tmp_path / "x.safetensors", header, b"\0" * 4), message)


def test_huge_headers_are_not_read(tmp_path):
    refused(
        raw(tmp_path / "x.safetensors", b"{}", length=1 << 62), "claims a header of 4611686018427387904 bytes"
    )
    refused(raw(tmp_path / "x.safetensors", b"{}", length=20 << 20), "cut short")


def test_extra_bytes_at_the_end_are_damage(tmp_path):
    refused(raw(tmp_path / "x.safetensors", {"a": entry([1], 0, 4)}, b"\0" * 9), "is damaged")


@posix
def test_unreadable_files_are_said_so():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = good(Path(folder) / "x.safetensors")
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # an administrator reads everything: take another user's rights for a moment
                os.seteuid(65534)
            refused(path, "cannot be read: Permission denied")
        finally:
            os.seteuid(user)


# names


def test_names_stay_inside_their_folder(tmp_path):
    assert inside(tmp_path, "a/b c/ü.safetensors") == tmp_path.resolve() / "a" / "b c" / "ü.safetensors"
    (tmp_path / "out").symlink_to("/")
    (tmp_path / "in").symlink_to(tmp_path / "real")
    assert inside(tmp_path, "in/x") == tmp_path.resolve() / "real" / "x"
    bad = [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "~/x",
        "~root",
        "a\\b",
        "C:x",
        "C:/x",
        "a\0b",
        "a\ud800b",
    ]
    bad += [
        "a\nb",
        "NUL",
        "con.safetensors",
        "a/COM1.txt",
        "LPT9",
        "x.",
        "x ",
        "a*",
        "a|b",
        "out/x",
        "x" * 300,
        "...",
    ]
    for name in bad:
        with pytest.raises(PitError) as error:
            inside(tmp_path, name)
        assert str(error.value).encode()


# writing


def test_what_is_saved_comes_back(tmp_path):
    a = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": a,
        "turned": a.t(),
        "part": a[1:],
        "same": a,
        "scalar": torch.tensor(3),
        "half": a.to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(a * 2),
    }
    save_tensors(
        tmp_path / "new" / "deep" / "x.safetensors", tensors, {"n": 4, "text": "ü", "list": [1, {"a": None}]}
    )
    loaded, metadata = load_tensors(tmp_path / "new" / "deep" / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    assert metadata == {"n": "4", "text": "ü", "list": '[1, {"a": null}]'}


def test_tensors_made_in_inference_mode_can_be_saved(tmp_path):
    with torch.inference_mode():
        save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)[1:]})
        loaded, _ = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], torch.ones(2))


def test_new_files_follow_the_umask_and_nothing_else_is_left(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "x.safetensors"]


def test_a_failing_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = good(tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("stop")
    with pytest.raises(KeyboardInterrupt), replacing(path):
        raise KeyboardInterrupt
    with pytest.raises(PitError):
        save_tensors(path, {"a": torch.ones(2).to_sparse()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_loaded_can_be_replaced(tmp_path):
    path = good(tmp_path / "x.safetensors")
    tensors, _ = load_tensors(path)
    save_tensors(path, {k: v * 2 for k, v in tensors.items()})
    assert torch.equal(load_tensors(path)[0]["b"], torch.full((2,), 2.0, dtype=torch.float16))


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "store" / "real.txt")
    write_text_atomic(link, "one")
    write_text_atomic(link, "zwei ü\n")
    assert link.is_symlink() and (tmp_path / "store" / "real.txt").read_bytes() == "zwei ü\n".encode()
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["real.txt"]


def test_write_protected_targets_are_respected(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes_atomic(path, b"old")
    path.chmod(0o444)
    with pytest.raises(PitError, match="write-protected"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    with pytest.raises(PitError, match="is a folder"):
        write_bytes_atomic(tmp_path, b"new")
    with pytest.raises(PitError, match="cannot be written"):
        write_bytes_atomic(path / "below-a-file", b"new")


SIZE_LIMIT = """
    import resource, signal, sys
    import torch
    from pit_core.errors import PitError
    from pit_core.files import save_tensors, write_bytes_atomic
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for write in (
        lambda: save_tensors(sys.argv[1], {"a": torch.ones(100000)}),
        lambda: write_bytes_atomic(sys.argv[1], b"x" * 100000),
    ):
        try:
            write()
        except PitError as error:
            print(error)
"""


@posix
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    """The kernel's file size limit stands for the full disk: both fail in the middle of the write."""
    path = good(tmp_path / "x.safetensors")
    before = path.read_bytes()
    script = textwrap.dedent(SIZE_LIMIT)
    root = os.path.dirname(os.path.dirname(os.path.abspath(files.__file__)))
    env = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.count("The disk is full or at its limit") == 2, done.stdout + done.stderr
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_space_left_counts_as_a_full_disk(tmp_path):
    with pytest.raises(PitError, match="disk is full"), replacing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PitError, match="no permission"), replacing(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "denied")
    assert list(tmp_path.iterdir()) == []


def test_saving_shared_tensors_does_not_copy_what_stands_alone():
    a = torch.ones(4)
    ready = files._separate_copies({"a": a, "same": a, "view": a[:2]})
    pointers = [t.data_ptr() for t in ready.values()]
    assert pointers[0] == a.data_ptr() and len(set(pointers)) == 3


# checking


def test_hashes(tmp_path):
    write_bytes_atomic(tmp_path / "x", b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf")
    with pytest.raises(PitError, match="no file"):
        sha256_of(tmp_path / "y")
    a = {"a": torch.arange(6.0), "e": torch.zeros(0)}
    same = {"e": torch.zeros(0), "a": torch.arange(12.0).reshape(6, 2).contiguous()[:, 0] / 2}
    assert hash_tensors(a) == hash_tensors(same)
    others = [
        {"a": torch.arange(6.0)},
        {"b": a["a"]},
        {"a": a["a"].reshape(2, 3)},
        {"a": a["a"].to(torch.bfloat16)},
    ]
    assert len({hash_tensors(o) for o in [a, *others]}) == 5


def test_finite_check_names_the_tensors():
    bad = torch.tensor([1.0, float("nan")])
    tensors = {
        "a": bad,
        "b": -bad / 0,
        "c": bad.half(),
        "d": bad,
        "ok": torch.ones(2),
        "int": torch.ones(2).int(),
    }
    with pytest.raises(PitError, match=r"'x' holds NaN or infinite numbers \(a, b, c and 1 more\)"):
        check_finite(tensors, "'x'")
    check_finite(
        {"a": torch.ones(2), "empty": torch.zeros(0), "f8": torch.ones(2).to(torch.float8_e4m3fn)}, "x"
    )
    with pytest.raises(PitError):
        check_finite({"f8": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "x")


def test_shape_check_lists_what_differs():
    expected = {"a": (2, 3), "b": [4], "c": torch.Size([1])}
    check_shapes(expected, {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}, "x")
    with pytest.raises(
        PitError, match=r"missing: b, c; unexpected: z; wrong shape: a is \(3, 2\) instead of \(2, 3\)"
    ):
        check_shapes(expected, {"a": torch.zeros(3, 2), "z": torch.zeros(1)}, "'x'")


def test_common_dtype():
    half, single, eight = torch.zeros(1).half(), torch.zeros(1), torch.zeros(1).to(torch.float8_e4m3fn)
    assert common_dtype({"a": half, "b": eight}) == torch.float16
    assert common_dtype({"a": half, "b": single}) == torch.float32
    assert common_dtype({"a": eight}) == torch.float16


def test_existing_file_returns_the_path(tmp_path):
    path = good(tmp_path / "x.safetensors")
    assert existing_file(str(path)) == path
