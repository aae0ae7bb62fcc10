"""All nodes of the pack; a class's name is its node's id."""

from . import host
from .b4m import PiTApplyB4M, PiTLoadB4M, PiTSaveB4M
from .cut_out import PiTCutOut
from .diptych import PiTDiptychAttention, PiTDiptychCrop, PiTDiptychPrepare, PiTDiptychPrompt
from .directions import (
    PiTEditTokens,
    PiTFindDirection,
    PiTLoadDirection,
    PiTPreviewDirection,
    PiTSaveDirection,
    PiTSweepDirection,
    PiTSweepGrid,
)
from .ip_lora import PiTIPLoRA
from .ip_prior import PiTLoadPrior, PiTSamplePrior
from .ip_tokens import PiTApplyTokens, PiTEncodeImage, PiTEncodeParts, PiTLoadIPAdapter, PiTTokensFromEmbeds
from .miniature import PiTMiniatureFlux, PiTMiniatureSDXL
from .token_tools import PiTCombineTokens, PiTLoadTokens, PiTPreviewTokens, PiTSaveTokens

__all__ = ["NODES", "host"]

NODES = (
    PiTLoadIPAdapter,
    PiTEncodeImage,
    PiTEncodeParts,
    PiTTokensFromEmbeds,
    PiTCombineTokens,
    PiTApplyTokens,
    PiTPreviewTokens,
    PiTSaveTokens,
    PiTLoadTokens,
    PiTLoadPrior,
    PiTSamplePrior,
    PiTFindDirection,
    PiTEditTokens,
    PiTSweepDirection,
    PiTSweepGrid,
    PiTPreviewDirection,
    PiTSaveDirection,
    PiTLoadDirection,
    PiTIPLoRA,
    PiTLoadB4M,
    PiTApplyB4M,
    PiTSaveB4M,
    PiTDiptychPrepare,
    PiTDiptychPrompt,
    PiTDiptychAttention,
    PiTDiptychCrop,
    PiTCutOut,
    PiTMiniatureSDXL,
    PiTMiniatureFlux,
)
