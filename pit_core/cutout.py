"""Subjects and parts cut out of pictures: detection by words, masks, and what stands in front.

All models are the user's own, from local folders, through classes that transformers has itself: code that
lies in a model's folder is never run.

- `load_detector`: GroundingDINO (arXiv 2303.05499), OWL-ViT (2205.06230), OWLv2 (2306.09683): words -> boxes
- `load_segmenter`: SAM (arXiv 2304.02643) or SAM 2 (2408.00714): boxes -> masks, or all masks of a picture
- `load_foreground`: a segmentation model that tells the subject from the background
- `read_mask`: a mask that was made elsewhere
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import PitError
from .pictures import read_picture
from .render import load_part

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MARGIN = 1.0  # of SAM's logits either way, over which a stable mask hardly changes
POINTS_AT_A_TIME = 64

PixelBox = tuple[float, float, float, float]
"""Left, top, right, bottom in the picture's pixels."""


@dataclass(frozen=True)
class Detection:
    """A box, the number of the phrase that it answers, and how sure the model is, 0 to 1."""

    box: PixelBox
    phrase: int
    score: float


# detection


class Detector:
    """Finds what words name. Subclasses turn (picture, phrases) into scores and boxes."""

    threshold: float
    """The usual one: families differ in how sure they are."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    @torch.no_grad()
    def find(
        self,
        image: Image.Image,
        phrases: Sequence[str],
        threshold: float | None = None,
        *,
        overlap: float = 0.5,
    ) -> list[Detection]:
        """Boxes of what the phrases name, the surest first, in an RGB picture.

        Each box goes to the phrase that fits it best. Of boxes of one phrase that overlap by more than
        `overlap` (intersection over union) only the surest stays. Raises PitError for phrases that are too
        long for the model.
        """
        scores, boxes = self._predict(image.convert("RGB"), list(phrases))
        best, phrase = scores.float().max(dim=1)
        least = self.threshold if threshold is None else threshold
        found: list[Detection] = []
        for number in torch.argsort(best, descending=True, stable=True).tolist():
            if best[number] < least:
                break
            box = _inside(boxes[number].tolist(), image.size)
            each = Detection(box, int(phrase[number]), float(best[number]))
            same = [other for other in found if other.phrase == each.phrase]
            if box[0] < box[2] and box[1] < box[3] and all(_iou(each.box, o.box) <= overlap for o in same):
                found.append(each)
        return found

    def _predict(self, image: Image.Image, phrases: list[str]) -> tuple[Tensor, Tensor]:
        """Scores (boxes, phrases) and boxes (boxes, 4) in pixels."""
        raise NotImplementedError


class GroundingDino(Detector):
    """All phrases in one text; a phrase's score is that of its best word."""

    threshold = 0.3

    def _predict(self, image: Image.Image, phrases: list[str]) -> tuple[Tensor, Tensor]:
        ids, spans = self._text(phrases)
        size = _fitted(image.size, *_edges(self.settings))
        pixels = _pixels(image, size, IMAGENET, self.model)
        device = pixels.device
        out = self.model(
            pixel_values=pixels,
            pixel_mask=torch.ones(1, size[1], size[0], dtype=torch.long, device=device),
            input_ids=ids.to(device),
            token_type_ids=torch.zeros_like(ids).to(device),
            attention_mask=torch.ones_like(ids).to(device),
        )
        words = out.logits[0].sigmoid().cpu()  # (boxes, words)
        scores = torch.stack([words[:, first:last].amax(dim=1) for first, last in spans], dim=1)
        return scores, _corners(out.pred_boxes[0], image.size)

    def _text(self, phrases: list[str]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Ids (1, T) of "[CLS] head . legs . [SEP]", and where each phrase's words stand."""
        tokenizer = self.tokenizer
        stop = tokenizer.convert_tokens_to_ids(".")
        ids, spans = [tokenizer.cls_token_id], []
        for phrase in phrases:
            words = tokenizer(phrase.lower(), add_special_tokens=False).input_ids
            spans.append((len(ids), len(ids) + len(words)))
            ids += [*words, stop]
        ids.append(tokenizer.sep_token_id)
        most = self.model.config.max_text_len
        if len(ids) > most:
            raise PitError(
                f"The phrases are {len(ids)} tokens long, but this detector reads {most}; take fewer."
            )
        return torch.tensor([ids]), spans


class Owl(Detector):
    """OWL-ViT and OWLv2: a text for each phrase. OWLv2 sees the picture in the corner of a grey square."""

    threshold = 0.2

    def _predict(self, image: Image.Image, phrases: list[str]) -> tuple[Tensor, Tensor]:
        config = self.model.config
        padded = config.model_type == "owlv2"
        square = (max(image.size),) * 2 if padded else image.size
        seen = Image.new("RGB", square, (128, 128, 128))
        seen.paste(image, (0, 0))
        side = config.vision_config.image_size
        pixels = _pixels(seen, (side, side), CLIP, self.model)
        length = config.text_config.max_position_embeddings
        text = self.tokenizer(phrases, padding="max_length", max_length=length, return_tensors="pt")
        if text.input_ids.shape[1] > length:
            raise PitError(
                f"A phrase is longer than the {length} tokens that this detector reads; shorten it."
            )
        out = self.model(
            pixel_values=pixels,
            input_ids=text.input_ids.to(pixels.device),
            attention_mask=text.attention_mask.to(pixels.device),
        )
        return out.logits[0].sigmoid().cpu(), _corners(out.pred_boxes[0], square)


def load_detector(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Detector:
    """A detector out of a transformers folder. Raises PitError for other models and damaged folders."""
    import transformers

    path = Path(folder)
    kinds: dict[str, tuple[type[Detector], str]] = {
        "grounding-dino": (GroundingDino, "GroundingDinoForObjectDetection"),
        "owlvit": (Owl, "OwlViTForObjectDetection"),
        "owlv2": (Owl, "Owlv2ForObjectDetection"),
    }
    ours, theirs = kinds[_model_type(path, kinds, "GroundingDINO, OWL-ViT or OWLv2")]
    model = load_part(getattr(transformers, theirs), path, dtype=dtype)
    tokenizer = load_part(transformers.AutoTokenizer, path)
    return ours(model.eval().to(device), tokenizer, _settings(path))


# segmentation


@dataclass(frozen=True)
class EveryMask:
    """How all masks of a picture are found: points a side of the grid that is asked, and what is kept.

    iou: how good the model thinks a mask is. stability: how little it changes with the threshold. overlap: of
    masks whose boxes overlap more (intersection over union) the best stays. The defaults are SAM's own.
    """

    points: int = 32
    iou: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7


class Segmenter:
    """SAM or SAM 2: masks (H, W) bool of an RGB picture's size."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_sam2 = model.config.model_type != "sam"

    @torch.no_grad()
    def masks(self, image: Image.Image, boxes: Sequence[PixelBox]) -> list[np.ndarray]:
        """The mask of what each box holds."""
        if not boxes:
            return []
        view = _View(image, self)
        corners = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 2, 2)
        prompt = view.scaled(corners).view(1, -1, 4)
        out = self.model(**view.features, input_boxes=prompt, multimask_output=False)
        return [view.mask(logits) for logits in out.pred_masks[0, :, 0].float()]

    @torch.no_grad()
    def everything(self, image: Image.Image, settings: EveryMask | None = None) -> list[np.ndarray]:
        """The masks of all that points on a grid lie on, the best first."""
        settings = settings or EveryMask()
        view = _View(image, self)
        steps = (torch.arange(settings.points) + 0.5) / settings.points
        grid = torch.cartesian_prod(steps, steps) * torch.tensor(image.size)
        logits, scores = [], []
        for points in grid.split(POINTS_AT_A_TIME):
            prompt = view.scaled(points.view(1, -1, 1, 2))
            out = self.model(**view.features, input_points=prompt, multimask_output=True)
            masks, rated = out.pred_masks[0].flatten(0, 1).float(), out.iou_scores[0].flatten().float()
            kept = (rated >= settings.iou) & (_stability(masks) >= settings.stability)
            logits.append(masks[kept].cpu())
            scores.append(rated[kept].cpu())
        return [view.mask(each) for each in _best(torch.cat(logits), torch.cat(scores), settings.overlap)]


class _View:
    """A picture as SAM sees it: encoded once, with the way there and back for points and masks.

    SAM keeps the picture's shape, in the corner of a square; SAM 2 stretches it to the square.
    """

    def __init__(self, image: Image.Image, segmenter: Segmenter) -> None:
        config = segmenter.model.config
        prompts = config.prompt_encoder_config
        self.side = int(prompts.image_size)
        self.size = image.size
        width, height = image.size
        longest = max(width, height)
        self.inner = (self.side, self.side)
        if not segmenter.is_sam2:
            self.inner = tuple(max(1, round(s * self.side / longest)) for s in (width, height))  # type: ignore
        pixels = _pixels(image, self.inner, IMAGENET, segmenter.model)
        right, below = self.side - self.inner[0], self.side - self.inner[1]
        pixels = torch.nn.functional.pad(pixels, (0, right, 0, below))
        self.features = {"image_embeddings": segmenter.model.get_image_embeddings(pixels)}
        self.like = pixels

    def scaled(self, points: Tensor) -> Tensor:
        """(..., 2) x and y in the picture -> in the square."""
        factors = torch.tensor([inner / own for inner, own in zip(self.inner, self.size, strict=True)])
        return (points * factors).to(self.like)

    def mask(self, logits: Tensor) -> np.ndarray:
        """Low logits (h, w) of the square -> (H, W) bool of the picture."""
        square = _resized(logits, (self.side, self.side))
        return (_resized(square[: self.inner[1], : self.inner[0]], self.size) > 0).cpu().numpy()


def load_segmenter(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Segmenter:
    """SAM or SAM 2 out of a transformers folder. Raises PitError for other models and damaged folders."""
    import transformers

    path = Path(folder)
    kinds = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}  # published under that name
    name = kinds[_model_type(path, kinds, "SAM or SAM 2")]
    return Segmenter(load_part(getattr(transformers, name), path, dtype=dtype).eval().to(device))


# subjects


class Foreground:
    """A segmentation model that tells the subject from the background; the subject is every other class.

    With a single class its logit is the subject's. `background` is the number of the background's class.
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model = model
        names = {str(name).lower(): int(i) for i, name in (model.config.id2label or {}).items()}
        self.background = names.get("background", 0)
        size = settings.get("size")
        sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
        self.side = next((side for side in sides if isinstance(side, int)), 512)
        mean, std = settings.get("image_mean"), settings.get("image_std")
        self.normal = (tuple(mean), tuple(std)) if mean and std else IMAGENET

    @torch.no_grad()
    def mask(self, image: Image.Image) -> np.ndarray:
        """Where the subject of a picture is, (H, W) bool."""
        pixels = _pixels(image, (self.side, self.side), self.normal, self.model)
        logits = self.model(pixel_values=pixels).logits[0].float()  # (classes, h, w)
        if len(logits) > 1:
            others = torch.cat([logits[: self.background], logits[self.background + 1 :]])
            logits = (torch.logsumexp(others, dim=0) - logits[self.background])[None]
        return (_resized(logits[0], image.size) > 0).cpu().numpy()


def load_foreground(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Foreground:
    """A segmentation model that transformers knows, such as a SegFormer. Raises PitError for others."""
    import transformers

    path = Path(folder)
    config = _config(path)
    known = transformers.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    if config.get("model_type") not in known:
        what = (config.get("architectures") or [config.get("model_type")])[0]
        raise PitError(
            f"'{path.name}' holds a {what}, which transformers does not know as a segmentation model (code "
            "in its folder is not run); take one that it knows, SAM with a detector, or make masks elsewhere."
        )
    kind = getattr(transformers, known[config["model_type"]])
    return Foreground(load_part(kind, path, dtype=dtype).eval().to(device), _settings(path))


def subject_mask(
    image: Image.Image, phrase: str, detector: Detector, segmenter: Segmenter, threshold: float | None = None
) -> np.ndarray:
    """Where the thing that a phrase names is, (H, W) bool. Raises PitError when it is not found."""
    found = detector.find(image, [phrase], threshold)
    if not found:
        raise PitError(
            f"Nothing in the picture was found as '{phrase}'; use other words or a lower threshold."
        )
    return segmenter.masks(image, [found[0].box])[0]


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """A mask out of a picture file, (H, W) bool: what is white, or opaque where there is transparency.

    Raises PitError for a file that is no picture, and for an empty mask.
    """
    image = read_picture(path)
    channel = image.getchannel("A") if image.mode == "RGBA" else image.convert("L")
    mask = np.asarray(channel) > 127
    if not mask.any():
        raise PitError(f"The mask '{Path(path).name}' is empty; what it marks should be white.")
    return mask


def on_white(image: Image.Image, mask: np.ndarray, *, crop: bool = False) -> Image.Image:
    """What the mask (H, W) marks, on white, RGB, in the picture's size or cropped to the mask.

    Raises PitError for a mask that is empty or of another size.
    """
    if mask.shape != (image.height, image.width):
        raise PitError(
            f"The mask is {mask.shape[1]} x {mask.shape[0]} px, but its picture {image.width} x "
            f"{image.height} px; make masks of the picture's size."
        )
    stencil = Image.fromarray(mask.astype(np.uint8) * 255)
    box = stencil.getbbox()
    if box is None:
        raise PitError("The mask is empty; nothing would be left of the picture.")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    seen = Image.alpha_composite(white, image.convert("RGBA"))  # transparency counts as white
    whole = Image.composite(seen, white, stencil).convert("RGB")
    return whole.crop(box) if crop else whole


# folders


def _model_type(folder: Path, known: Sequence[str] | dict[str, Any], words: str) -> str:
    kind = _config(folder).get("model_type")
    if kind not in known:
        raise PitError(f"'{folder.name}' holds a {kind or 'model without a type'}, but {words} was expected.")
    return str(kind)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PitError(f"There is no folder '{folder}'; a model folder with config.json was expected.")
    if not (folder / "config.json").is_file():
        raise PitError(f"'{folder}' is no model folder: it has no config.json.")
    return _json(folder / "config.json")


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder says of preprocessing; older folders lack the file."""
    path = folder / "preprocessor_config.json"
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PitError(f"'{path}' is damaged; fetch it again.") from error
    if not isinstance(loaded, dict):
        raise PitError(f"'{path}' is damaged; fetch it again.")
    return loaded


# pixels, boxes and masks


def _pixels(
    image: Image.Image, size: tuple[int, int], normal: tuple[Sequence[float], Sequence[float]], model: Any
) -> Tensor:
    """(1, 3, height, width), resized and normalised, as the model's weights are."""
    weight = next(model.parameters())
    small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255  # HWC -> BCHW
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in normal)
    return ((values - mean) / std).to(weight.device, weight.dtype)


def _edges(settings: dict[str, Any]) -> tuple[int, int]:
    """The shortest and the longest side that the picture is scaled to."""
    size = settings.get("size")
    given = size if isinstance(size, dict) else {}
    return int(given.get("shortest_edge") or 800), int(given.get("longest_edge") or 1333)


def _fitted(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    scale = min(shortest / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) centre, width and height as shares -> left, top, right, bottom in pixels."""
    x, y, w, h = boxes.float().cpu().unbind(-1)
    scale = torch.tensor([*size, *size], dtype=torch.float32)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1) * scale


def _inside(box: Sequence[float], size: tuple[int, int]) -> PixelBox:
    left, top, right, bottom = (value if math.isfinite(value) else 0.0 for value in box)
    width, height = size
    return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))


def _iou(a: PixelBox, b: PixelBox) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared) if shared else 0.0


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) -> (height, width) of `size`."""
    return interpolate(logits[None, None], (size[1], size[0]), mode="bilinear", align_corners=False)[0, 0]


def _stability(logits: Tensor) -> Tensor:
    """(N, h, w) -> (N,): the share of a mask that stays when its threshold rises."""
    wide = (logits > -MARGIN).sum((1, 2))
    return (logits > MARGIN).sum((1, 2)) / wide.clamp(min=1)


def _best(logits: Tensor, scores: Tensor, overlap: float) -> list[Tensor]:
    """Masks (N, h, w), the best first, without those whose boxes were there before."""
    kept: list[tuple[PixelBox, Tensor]] = []
    for number in torch.argsort(scores, descending=True, stable=True).tolist():
        rows, columns = torch.nonzero(logits[number] > 0, as_tuple=True)
        if not len(rows):
            continue
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        box: PixelBox = tuple(float(edge) for edge in edges)  # type: ignore[assignment]
        if all(_iou(box, other) <= overlap for other, _ in kept):
            kept.append((box, logits[number]))
    return [each for _, each in kept]
