"""What draws the previews of `pit train ip-prior`: the miniature, which reads them as well, or an SDXL."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import PitError
from .common import Dtype, place_and_dtype, without_loading_bars

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..ip_prior.info import PriorInfo
    from ..ip_prior.model import IPPrior
    from ..train.ip_prior_preview import Decoder, LoadDecoder, PriorPreview

CASES = 1_000  # the seed of what is judged in training, not that of `pit evaluate`


def load_decoder(settings: PriorPreview) -> Decoder:
    """What the settings name. Raises PitError for others, and as its files' loaders do."""
    kinds: dict[str, LoadDecoder] = {"miniature": MiniatureDecoder, "sdxl": SdxlDecoder}
    if settings.model not in kinds:
        raise PitError(f"Expected the preview's model to be {' or '.join(kinds)}, got '{settings.model}'.")
    without_loading_bars()
    return kinds[settings.model](settings)


class MiniatureDecoder:
    """The miniature draws, and its second reader counts the parts kept on critters of its world."""

    def __init__(self, settings: PriorPreview) -> None:
        import torch

        from ..miniature.models import load_stack

        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # as the training decides it
        self.stack = load_stack(device=self.device)
        self.adapter = self.stack.adapter
        self.judge = self._load_judge() if settings.judged else None

    def draw(self, tokens: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        stack = self.stack
        return stack.renderer.render(tokens, stack.null("grey"), stack.defaults, seeds=seeds)

    def measure(self, prior: IPPrior, info: PriorInfo) -> dict[str, float]:
        """Shares in [0, 1]: "parts_kept", and "valid" creatures."""
        from ..evaluate.concepts import of_prior

        if self.judge is None:
            return {}
        stack = replace(self.stack, prior=prior, prior_info=info)
        row = of_prior(stack, self.judge, count=self.settings.judged, seed=CASES + self.settings.seed)
        return {"parts_kept": row.kept, "valid": row.valid}

    def _load_judge(self) -> Any:
        from ..miniature.models import load_reader

        try:
            return load_reader("judge")
        except PitError as error:
            warnings.warn(f"The parts kept are not measured: {error}", stacklevel=2)
            return None


class SdxlDecoder:
    """The user's SDXL. Between the previews it waits in the computer's memory, not in the GPU's."""

    def __init__(self, settings: PriorPreview) -> None:
        from ..ip_adapter.checkpoint import check_encoder, load_ip_adapter
        from ..ip_adapter.encode import load_image_encoder, null_tokens
        from ..render import load_renderer
        from ..sample import DTYPES

        needed = (settings.sdxl, settings.image_encoder, settings.ip_adapter)
        if None in needed:
            raise PitError("A preview by sdxl needs sdxl, image_encoder and ip_adapter beside its model.")
        sdxl, image_encoder, ip_adapter = (path for path in needed if path is not None)
        self.device, kind = place_and_dtype(True, "auto", Dtype.auto)
        dtype = DTYPES[kind]
        self.adapter = load_ip_adapter(ip_adapter, dtype=dtype)
        self.renderer = load_renderer(sdxl, self.adapter, config=settings.sdxl_config, dtype=dtype)
        encoder = load_image_encoder(image_encoder, dtype=dtype, device=self.device)
        check_encoder(self.adapter, encoder.hidden_width, encoder.projection_dim)
        with self._on_device():
            self.null = null_tokens(encoder, self.adapter, "grey")

    def draw(self, tokens: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        with self._on_device():
            return self.renderer.render(tokens.to(self.device), self.null, seeds=seeds)

    def measure(self, prior: IPPrior, info: PriorInfo) -> dict[str, float]:
        """Nothing: there is no reader of its pictures."""
        return {}

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            self.renderer.pipe.to(self.device)
            self.adapter.to(self.device)
            yield
        finally:
            self.renderer.pipe.to("cpu")
            self.adapter.to("cpu")
