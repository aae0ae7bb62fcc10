"""`pit verify`: are these model files whole, of the right kind, and made for each other?

The report is text to paste into a bug report: versions, files with their hashes, what each one is, and one
picture with a fixed seed, whose hash tells two machines apart. Paths are named by their last part only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from . import __version__
from .concepts import Concept, Stack, StackFiles, check_prior_fits, load_stack, make_concepts
from .errors import PitError
from .files import check_finite
from .ip_adapter.adapter import IPAdapter
from .ip_adapter.checkpoint import check_encoder, describe_adapter, load_ip_adapter
from .ip_adapter.encode import load_image_encoder
from .ip_adapter.layers import describe_layers
from .ip_prior.checkpoint import load_prior
from .pictures import save_png
from .render import check_folder, layers_on_disk
from .runs import fingerprint, versions

SEED = 20_250_310
STEPS = 10  # of the picture of full-size files, which only has to show that the numbers hold
NEEDED = ("sdxl", "image_encoder", "ip_adapter", "prior")


@dataclass
class Report:
    """Lines for people, and whether everything that was looked at is in order."""

    ok: bool = True
    lines: list[str] = field(default_factory=list)
    picture: Path | None = None
    paths: tuple[Path, ...] = ()

    def check(self, what: str, step: Callable[[], Any]) -> Any:
        """Run a step that returns (value, sentence); what it raises becomes a failing line and None."""
        try:
            value, sentence = step()
        except PitError as error:
            return self.fail(what, str(error))
        except Exception as error:  # noqa: BLE001 - what the other steps find belongs into the report, too
            text = " ".join(str(error).split())[:300]
            return self.fail(what, f"{type(error).__name__}: {text}")
        self.lines.append(f"ok    {what}: {sentence}")
        return value

    def fail(self, what: str, sentence: str) -> None:
        self.ok = False
        self.lines.append(f"FAIL  {what}: {self._without_folders(sentence)}")

    def _without_folders(self, sentence: str) -> str:
        """The user's own folders are nobody's business in a bug report."""
        for path in self.paths:
            for folder in (path.parent.absolute(), path.parent):
                if folder.name:
                    sentence = sentence.replace(f"{folder}{os.sep}", "").replace(str(folder), folder.name)
        home = os.path.expanduser("~")
        return sentence.replace(home, "~") if len(home) > 1 else sentence

    def note(self, sentence: str) -> None:
        self.lines.append(f"note  {sentence}")

    def __str__(self) -> str:
        end = "Everything checked is in order." if self.ok else "Something is wrong: see the lines with FAIL."
        return "\n".join([*self.lines, end])


def verify(
    paths: Mapping[str, Path],
    *,
    out: Path | None = None,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Check files by name (sdxl, sdxl_config, image_encoder, ip_adapter, prior), each alone and together.

    What is not given is not checked; with all four kinds one picture is made in `steps` (10 by default), and
    kept in `out` if given. Never raises for a bad file: that is a line in the report.
    """
    report = _opened_report(device, dtype)
    report.paths = tuple(paths.values())
    loaded = {name: _look_at(report, name, path) for name, path in paths.items()}
    _compare(report, loaded)
    missing = [name for name in NEEDED if name not in paths]
    if missing:
        report.note(f"No picture was made: that needs {', '.join(_option(name) for name in missing)} too.")
    elif report.ok:
        loaded.clear()  # before everything is loaded again, in the run's dtype and on its device
        files = StackFiles(**paths)
        stack = report.check("all together", lambda: _load_all(files, device, dtype))
        if stack is not None:
            _make_picture(report, stack, STEPS if steps is None else steps, out)
    return report


def verify_stack(stack: Stack, *, out: Path | None = None, steps: int | None = None) -> Report:
    """The same for a stack that is loaded already, such as the miniature; `steps` are its own by default."""
    report = _opened_report(stack.renderer.unet.device, stack.renderer.unet.dtype)
    for name, digest in stack.hashes.items():
        report.lines.append(f"ok    {name}: sha256 {digest}")
    report.lines.append(f"ok    {stack.name}: {describe_adapter(stack.adapter)}")
    _make_picture(report, stack, steps, out)
    return report


def test_part() -> Image.Image:
    """The part that the picture is made of: a red horn on nothing, drawn the same everywhere."""
    part = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    pen = ImageDraw.Draw(part)
    pen.polygon([(40, 230), (128, 20), (216, 230)], fill=(200, 40, 40, 255))
    pen.ellipse([90, 150, 166, 226], fill=(250, 210, 70, 255))
    return part


def _opened_report(device: torch.device | str, dtype: torch.dtype) -> Report:
    where = f"{device}, {str(dtype).removeprefix('torch.')}"
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return Report(lines=[f"Piece it Together {__version__} on {where}", found])


def _look_at(report: Report, name: str, path: Path) -> Any:
    """One file alone: what it is, and the hash of what is on the disk now."""
    readers: dict[str, Callable[[Path], tuple[Any, str]]] = {
        "sdxl": _read_sdxl,
        "image_encoder": _read_encoder,
        "ip_adapter": _read_adapter,
        "prior": _read_prior,
        "sdxl_config": _read_sdxl_config,
    }

    def step() -> tuple[Any, str]:
        value, sentence = readers[name](path)
        return value, f"{sentence}\n      sha256 {fingerprint(path, fresh=True)}"

    value = report.check(f"{_option(name)} {path.name}", step)
    if name == "prior" and value is not None:
        for sentence in value[1].notes:
            report.note(sentence)
    return value


def _read_sdxl(path: Path) -> tuple[Any, str]:
    layers = layers_on_disk(path)
    return layers, describe_layers(layers)


def _read_sdxl_config(path: Path) -> tuple[Any, str]:
    check_folder(path)
    return path, "a diffusers folder of SDXL, for its settings and tokenizers"


def _read_encoder(path: Path) -> tuple[Any, str]:
    encoder = load_image_encoder(path)
    widths = f"hidden states {encoder.hidden_width}, embedding {encoder.projection_dim} wide"
    return encoder, f"{widths}, reads {encoder.image_size} px, finite"


def _read_adapter(path: Path) -> tuple[Any, str]:
    adapter = load_ip_adapter(path)
    return adapter, f"{describe_adapter(adapter)}, finite"


def _read_prior(path: Path) -> tuple[Any, str]:
    prior, info = load_prior(path)
    sizes = ", ".join(f"{name} {value}" for name, value in info.settings().items())
    return (prior, info), f"{sizes}, {sum(p.numel() for p in prior.parameters()):,} parameters, finite"


def _load_all(files: StackFiles, device: torch.device | str, dtype: torch.dtype) -> tuple[Stack, str]:
    """The stack; SDXL's numbers are looked at here, because it is loaded nowhere else."""
    stack = load_stack(files, device=device, dtype=dtype)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = getattr(stack.renderer.pipe, name)
        if part is not None:
            check_finite(part.state_dict(), f"the {name} of '{files.sdxl.name}'")
    return stack, "they load and fit, SDXL finite"


def _compare(report: Report, loaded: Mapping[str, Any]) -> None:
    """Each pair of files that were both given and are both whole."""
    if loaded.get("ip_adapter") is None:
        return
    adapter: IPAdapter = loaded["ip_adapter"]
    checks: dict[str, Callable[[Any], None]] = {
        "sdxl": lambda layers: adapter.layers.check_fits(layers, adapter.name),
        "image_encoder": lambda e: check_encoder(adapter, e.hidden_width, e.projection_dim),
        "prior": lambda prior: check_prior_fits(prior[0], adapter),
    }
    for name, check in checks.items():
        other = loaded.get(name)
        if other is not None:
            report.check(f"--ip-adapter and {_option(name)}", partial(_compared, check, other))


def _compared(check: Callable[[Any], None], other: Any) -> tuple[bool, str]:
    check(other)
    return True, "made for each other"


def _make_picture(report: Report, stack: Stack, steps: int | None, out: Path | None) -> None:
    def step() -> tuple[Concept, str]:
        concept = make_concepts(stack, [test_part()], count=1, seed=SEED, steps=steps)[0]
        digest = hashlib.sha256(concept.image.tobytes()).hexdigest()[:16]
        size = f"{concept.image.width} x {concept.image.height} px"
        if out is not None:
            save_png(concept.image, out / "verify.png")
            report.picture = out / "verify.png"
        tokens = f"tokens {concept.tokens.mean():+.4f} +- {concept.tokens.std():.4f}"
        return concept, f"seed {SEED}, {size}, pixels {digest}, {tokens}"

    concept = report.check("picture", step)
    if concept is None:
        return
    if concept.image.convert("L").getextrema()[0] == concept.image.convert("L").getextrema()[1]:
        report.fail("picture", "it has one colour only; the models' numbers overflow in this dtype.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
