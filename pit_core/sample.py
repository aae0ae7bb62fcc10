"""`pit sample`: picture files of parts in; concepts, a contact sheet, tokens and a record out, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import __version__
from .backgrounds import CutOut, load_cut_out, on_paper
from .concepts import (
    Concept,
    Job,
    PriorSettings,
    Stack,
    StackFiles,
    Stage,
    advice,
    concept_seeds,
    load_stack,
    make_many,
    picture_seed,
    prepare_parts,
)
from .directions.moves import Moves, read_moves, recorded_moves
from .errors import PitError
from .files import existing_file
from .ip_adapter.tokens import IPTokens, save_ip_tokens
from .lora.formats import load_lora
from .lora.kinds import IP_LORA, kind_of
from .lora.model import Lora
from .lora.placing import Strengths
from .parts.canvas import crop_transparent, reference_grid
from .pictures import SheetRow, Tile, contact_sheet, picture_files, read_picture, save_png
from .render import RenderSettings, for_ip_lora
from .runs import (
    JobFiles,
    Record,
    RunFolder,
    check_part_files,
    file_entry,
    matched_paths,
    part_kinds,
    random_sets,
    read_record,
    recorded_file,
    version_note,
    write_record,
)

__all__ = [
    "DTYPES",
    "CutOut",
    "JobFiles",
    "LoraFile",
    "Model",
    "Moves",
    "Output",
    "PriorSettings",
    "Repeat",
    "Request",
    "RunFolder",
    "Settings",
    "StackFiles",
    "best_device",
    "changed",
    "check_render",
    "check_same_weights",
    "checked_device",
    "load_cut_out",
    "lora_defaults",
    "lora_file",
    "matched_paths",
    "notes",
    "picture_files",
    "read_jobs",
    "read_moves",
    "repeat_of",
    "run",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What to make, in files. random: so many random sets of the parts, instead of all of them together.
    masks: of parts, reference and init, in that order; or none.

    With `init` the parts may be left out: the prior then varies that concept on its own.
    """

    parts: Sequence[Path]
    count: int
    seed: int
    reference: Sequence[Path] = ()
    init: Path | None = None
    random: int | None = None
    masks: Sequence[Path] = ()

    def check(self) -> None:
        """Raise PitError for what cannot run, before any model is loaded."""
        if not self.parts and (self.init is None or self.random is not None):
            raise PitError("Expected part pictures, got none; name them with --parts wing.png horns.png.")
        if self.random is None:
            check_part_files(self.parts)
        elif not 1 <= self.random <= 1000:
            raise PitError(f"Expected 1 to 1000 random sets, got {self.random}.")
        else:
            part_kinds(self.parts)
        if len(self.reference) not in (0, 1, 4):
            raise PitError(f"A reference is 1 picture or 4 (a 2x2 grid), but got {len(self.reference)}.")
        for path in [*self.reference, *([self.init] if self.init else []), *self.masks]:
            existing_file(path)
        self._check_masks()
        concept_seeds(self.seed, self.count * (self.random or 1))

    def _check_masks(self) -> None:
        if self.masks and self.random is not None:
            raise PitError("Masks belong to pictures in an order, which random sets do not have.")
        pictures = len(self.parts) + len(self.reference) + (self.init is not None)
        if len(self.masks) not in (0, pictures):
            raise PitError(
                f"Expected a mask for each of the {pictures} pictures (parts, reference and start, in that "
                f"order), got {len(self.masks)}."
            )

    def jobs(self, most: int) -> list[JobFiles]:
        """The sets of parts, each with seeds of its own; random sets have up to `most` parts."""
        sets = (
            [tuple(self.parts)]
            if self.random is None
            else random_sets(self.parts, self.random, self.seed, most)
        )
        seeds = concept_seeds(self.seed, self.count * len(sets))
        return [
            JobFiles(
                parts,
                tuple(seeds[i * self.count : (i + 1) * self.count]),
                tuple(self.reference),
                self.init,
                tuple(self.masks),
            )
            for i, parts in enumerate(sets)
        ]


@dataclass(frozen=True)
class Settings:
    """All numbers and texts of a run."""

    prior: PriorSettings = field(default_factory=PriorSettings)
    render: RenderSettings = field(default_factory=RenderSettings)
    as_sketch: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """Raises PitError for a record with other entries."""
        try:
            render = dict(record["render"])
            render["size"] = None if render["size"] is None else tuple(render["size"])
            if isinstance(render["weight"], dict):  # by layer; JSON knows no numbers as names
                render["weight"] = {int(layer): weight for layer, weight in render["weight"].items()}
            return cls(PriorSettings(**record["prior"]), RenderSettings(**render), bool(record["as_sketch"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PitError(
                "The record's settings are damaged or of another release; they cannot be repeated."
            ) from error


@dataclass(frozen=True)
class Output:
    """The files that a run wrote."""

    folder: Path
    sheet: Path
    concepts: tuple[Path, ...]
    record: Path
    tokens: Path


@dataclass(frozen=True)
class Model:
    """What the record says of the models: their name, their files, device and dtype."""

    name: str
    files: StackFiles | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def load(self) -> Stack:
        """The stack of `files`. Raises PitError as load_stack does, and for a device that is not there."""
        if self.files is None:
            raise PitError(f"There is no model named '{self.name}'; the miniature or files of your own are.")
        return load_stack(self.files, device=checked_device(self.device), dtype=DTYPES[self.dtype])


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA that UNet and adapter are under while the pictures are drawn."""

    path: Path
    strength: float
    lora: Lora

    @property
    def strengths(self) -> Strengths:
        return Strengths(self.strength)


def lora_file(named: str) -> LoraFile:
    """The LoRA of `FILE` or `FILE:strength`, read. Raises PitError as load_lora, and for an odd strength."""
    path, _, number = named.rpartition(":")
    try:
        strength = float(number)
    except ValueError:  # no number behind it, or the colon is that of a drive
        path, strength = named, 1.0
    if not path or Path(named).exists():
        path, strength = named, 1.0
    Strengths(strength)
    return LoraFile(Path(path), strength, load_lora(path))


def lora_defaults(defaults: RenderSettings, loras: Sequence[LoraFile]) -> RenderSettings:
    """The render settings that suit a stack under these LoRAs."""
    return for_ip_lora(defaults) if any(kind_of(each.lora) == IP_LORA for each in loras) else defaults


def run(
    stack: Stack,
    jobs: Sequence[JobFiles],
    settings: Settings,
    folder: RunFolder,
    *,
    model: Model,
    loras: Sequence[LoraFile] = (),
    moves: Moves | None = None,
    cut_out: CutOut | None = None,
    command: Sequence[str] = (),
    stage: Stage | None = None,
) -> Output:
    """Make the concepts of all jobs and write them; a run that fails leaves nothing behind.

    cut_out: turns the pictures' backgrounds white. Raises PitError for pictures that cannot be read or cut
    out, for directions (`moves`) that do not fit, and as make_many and the writing do.
    """
    moves = moves or Moves()
    edit = moves.edit(stack.adapter)
    pictures = _read_all(jobs)
    ready = [_job(files, on_paper(files, pictures, cut_out), settings.as_sketch) for files in jobs]
    with stack.renderer.under_loras([(each.lora, each.strengths) for each in loras]):
        concepts = make_many(stack, ready, settings.prior, settings.render, edit=edit, stage=stage)
    sheet = contact_sheet(
        [_row(stack, *each) for each in zip(jobs, ready, concepts, strict=True)],
    )
    tokens = concept_tokens(stack, [concept for made in concepts for concept in made])
    with folder.writing():
        entry = _model_entry(model, stack, loras, folder.folder)
        changes = moves.entry(folder.folder)
        if cut_out is not None:
            changes["cut_out"] = file_entry(cut_out.folder, folder.folder)
        record = Record(entry, asdict(settings) | changes, [], command)
        return _write(folder, jobs, concepts, sheet, tokens, record)


def concept_tokens(stack: Stack, concepts: Sequence[Concept]) -> IPTokens:
    """The concepts' tokens as ComfyUI's nodes load them, with both nulls."""
    return IPTokens(
        torch.stack([concept.tokens for concept in concepts]),
        stack.adapter.num_tokens,
        null=stack.null("grey").cpu(),
        white=stack.null("white").cpu(),
        adapter=stack.adapter.content_hash,
    )


def read_jobs(jobs: Sequence[JobFiles]) -> None:
    """Read every picture and mask once, so that a bad one is found before the models are loaded."""
    pictures = _read_all(jobs)
    for path in dict.fromkeys(p for job in jobs for p in (*job.parts, *([job.init] if job.init else []))):
        try:
            crop_transparent(pictures[path])
        except PitError as error:
            raise PitError(f"'{path.name}': {error}") from error
    for job in jobs:
        on_paper(job, pictures)


def check_render(changes: Mapping[str, Any]) -> None:
    """Raise PitError for render settings out of range, before models are loaded; None is a default."""
    changed(RenderSettings(), changes)


def changed(defaults: RenderSettings, changes: Mapping[str, Any]) -> RenderSettings:
    """The defaults with the changes that are not None."""
    return replace(defaults, **{name: value for name, value in changes.items() if value is not None})


def notes(
    stack: Stack,
    jobs: Sequence[JobFiles],
    settings: Settings,
    loras: Sequence[LoraFile] = (),
    moves: Moves | None = None,
) -> list[str]:
    """What the user should know although the run goes on, each sentence once.

    Raises PitError for a LoRA that does not fit the stack.
    """
    unplaced = [stack.renderer.placed(each.lora).warning for each in loras]
    white = Image.new("RGB", (1, 1))
    found = [
        note
        for files in jobs
        for note in advice(stack, Job([white] * len(files.parts), files.seeds, as_sketch=settings.as_sketch))
    ]
    found += [] if moves is None else moves.notes(stack.adapter)
    return list(dict.fromkeys([*found, *filter(None, unplaced)]))


# repeating


@dataclass(frozen=True)
class Repeat:
    """A recorded run, its files found and unchanged."""

    jobs: Sequence[JobFiles]
    settings: Settings
    model: Model
    hashes: Mapping[str, str]
    loras: Sequence[LoraFile] = ()
    moves: Moves = field(default_factory=Moves)
    cut_out: Path | None = None
    note: str | None = None


def repeat_of(path: str | Path) -> Repeat:
    """The run in a record file. Raises PitError when it is none, or when a file is gone or has changed."""
    path = Path(path)
    record = read_record(path)
    try:
        jobs = [_recorded_job(entry, path) for entry in record.jobs]
        model = record.model
        files = {name: recorded_file(entry, path) for name, entry in model.get("files", {}).items()}
        named = Model(
            str(model["name"]),
            StackFiles(**files) if files else None,
            str(model["device"]),
            str(model["dtype"]),
        )
        hashes = {str(name): str(value) for name, value in model["hashes"].items()}
        loras = [_recorded_lora(entry, path) for entry in model.get("loras", [])]
        moves = recorded_moves(record.settings, path)
        entry = record.settings.get("cut_out")
        cut_out = None if entry is None else recorded_file(entry, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PitError(f"'{path.name}' is damaged or of another release; it cannot be repeated.") from error
    if named.dtype not in DTYPES:
        raise PitError(
            f"'{path.name}' names the dtype '{named.dtype}', which is none of {', '.join(DTYPES)}."
        )
    settings = Settings.from_record(record.settings)
    return Repeat(jobs, settings, named, hashes, loras, moves, cut_out, version_note(record.versions))


def check_same_weights(stack: Stack, hashes: Mapping[str, str]) -> None:
    """Raise PitError when a stack is no longer the recorded one: its weights, or the prior's settings."""
    changed = sorted(
        name for name in {**stack.hashes, **hashes} if stack.hashes.get(name) != hashes.get(name)
    )
    if changed:
        raise PitError(
            f"The model '{stack.name}' has changed since the run was recorded ({changed[0]}); "
            "put the former release or files back to repeat it."
        )


def _recorded_lora(entry: Mapping[str, Any], record: Path) -> LoraFile:
    path = recorded_file(entry, record)
    return LoraFile(path, float(entry["strength"]), load_lora(path))


def _recorded_job(entry: Mapping[str, Any], record: Path) -> JobFiles:
    return JobFiles(
        tuple(recorded_file(part, record) for part in entry["parts"]),
        tuple(int(concept["seed"]) for concept in entry["concepts"]),
        tuple(recorded_file(part, record) for part in entry["reference"]),
        None if entry["init"] is None else recorded_file(entry["init"], record),
        tuple(recorded_file(mask, record) for mask in entry.get("masks", [])),
    )


# device


def checked_device(name: str) -> torch.device:
    """A torch device that is there. Raises PitError for others."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" is a device, too, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PitError(f"The device '{name}' is not available here; cpu always is.") from error
    return device


def best_device() -> str:
    """cuda or mps where there is one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# pieces of a run


def _read_all(jobs: Sequence[JobFiles]) -> dict[Path, Image.Image]:
    return {path: read_picture(path) for path in dict.fromkeys(p for job in jobs for p in job.files())}


def _job(files: JobFiles, pictures: Sequence[Image.Image], as_sketch: bool) -> Job:
    """pictures: in the order of the files."""
    parts, reference = len(files.parts), len(files.reference)
    return Job(
        pictures[:parts],
        files.seeds,
        pictures[parts : parts + reference],
        None if files.init is None else pictures[-1],
        as_sketch,
    )


def _row(stack: Stack, files: JobFiles, job: Job, concepts: Sequence[Concept]) -> SheetRow:
    """What the encoder saw of the parts, then the concepts."""
    squares = prepare_parts(stack, job.parts, job.as_sketch)
    parts = [
        Tile(square, path.stem.replace("_", " ")) for square, path in zip(squares, files.parts, strict=True)
    ]
    if job.reference:
        parts.append(Tile(reference_grid(job.reference, stack.canvas), "reference"))
    if job.init is not None:
        parts.append(Tile(job.init, "start"))
    return SheetRow(parts, [Tile(concept.image, f"seed {concept.seed}") for concept in concepts])


def _write(
    folder: RunFolder,
    jobs: Sequence[JobFiles],
    concepts: Sequence[Sequence[Concept]],
    sheet: Image.Image,
    tokens: IPTokens,
    record: Record,
) -> Output:
    paths: list[Path] = []
    entries = []
    for files, made in zip(jobs, concepts, strict=True):
        written = [_write_concept(folder, len(paths) + 1 + i, each, files) for i, each in enumerate(made)]
        entries.append(_job_entry(files, [path.name for path in written], folder.folder))
        paths += written
    tokens_path, sheet_path = folder.add("tokens.safetensors"), folder.add("contact-sheet.png")
    seeds = [concept.seed for made in concepts for concept in made]
    save_ip_tokens(tokens_path, tokens, {"seeds": seeds, "model": record.model["name"]})
    save_png(sheet, sheet_path)
    # Last, because it says that the run is complete.
    record_path = folder.add("record.json")
    write_record(record_path, replace(record, jobs=entries))
    return Output(folder.folder, sheet_path, tuple(paths), record_path, tokens_path)


def _write_concept(folder: RunFolder, number: int, concept: Concept, files: JobFiles) -> Path:
    path = folder.add(f"concept-{number:02d}.png")
    text = {
        "Software": f"Piece it Together {__version__}",
        "pit seed": str(concept.seed),
        "pit parts": ", ".join(part.name for part in files.parts),
    }
    save_png(concept.image, path, text)
    return path


def _job_entry(files: JobFiles, names: Sequence[str], base: Path) -> dict[str, Any]:
    return {
        "parts": [file_entry(path, base) for path in files.parts],
        "reference": [file_entry(path, base) for path in files.reference],
        "init": None if files.init is None else file_entry(files.init, base),
        **({"masks": [file_entry(mask, base) for mask in files.masks]} if files.masks else {}),
        "concepts": [
            {"file": name, "seed": seed, "picture_seed": picture_seed(seed)}
            for name, seed in zip(names, files.seeds, strict=True)
        ],
    }


def _model_entry(model: Model, stack: Stack, loras: Sequence[LoraFile], base: Path) -> dict[str, Any]:
    files = {} if model.files is None else model.files.named()
    return {
        "name": model.name,
        "device": model.device,
        "dtype": model.dtype,
        "hashes": dict(stack.hashes),
        "files": {name: file_entry(path, base) for name, path in files.items()},
        "loras": [{**file_entry(each.path, base), "strength": each.strength} for each in loras],
    }
