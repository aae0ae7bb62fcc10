"""FLUX.1 at toy size, random weights, as the diffusers folder that it is published as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_stack
import torch

POOLED, TEXT = 8, 16  # widths of CLIP's and of T5's embeddings


def save(folder: Path, *, schnell: bool = True) -> Path:
    """schnell reads no guidance, dev does."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=not schnell,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.3,
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=32, d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2, is_gated_act=True)
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=tiny_stack._text_encoder(CLIPTextModel, POOLED),
        tokenizer=tiny_stack.tokenizer(folder / "words"),
        text_encoder_2=t5.eval(),
        tokenizer_2=_t5_tokenizer(folder / "pieces"),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _t5_tokenizer(folder: Path) -> Any:
    """T5's with letters for pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, local_files_only=True)
