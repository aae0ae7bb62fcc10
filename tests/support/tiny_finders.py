"""Detectors and segmenters of transformers' own classes at toy size, seeded random weights, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_MARKS = {"bos_token_id": 55, "eos_token_id": 56, "pad_token_id": 56}  # of tiny_stack's tokenizer
SIDE = 64  # of the square that SAM and the OWLs see
WORDS = ("head", "legs", "arms", "two", "a", "of", "hat")


def save_grounding_dino(folder: Path) -> None:
    """A Swin of two stages, BERT of one layer, one layer each of encoder and decoder."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    torch.manual_seed(1)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3"],
    )
    text = {
        "model_type": "bert",
        "vocab_size": 1050,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=32,
        num_feature_levels=3,
        max_text_len=16,
        disable_custom_kernels=True,
    )
    GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    _save_bert_words(folder)
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 96}}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes), "utf-8")


def save_owlv2(folder: Path) -> None:
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    torch.manual_seed(2)
    _save_owl(folder, Owlv2ForObjectDetection(Owlv2Config(**_owl_settings())))


def save_owlvit(folder: Path) -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    torch.manual_seed(3)
    _save_owl(folder, OwlViTForObjectDetection(OwlViTConfig(**_owl_settings())))


def save_sam(folder: Path) -> None:
    from transformers import SamConfig, SamModel

    torch.manual_seed(4)
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [0],
            "mlp_dim": 16,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIDE,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config=_decoder(),
    )
    SamModel(config).eval().save_pretrained(folder)


def save_sam2(folder: Path) -> None:
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(5)
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIDE,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        mask_decoder_config=_decoder(),
    )
    Sam2Model(config).eval().save_pretrained(folder)


def save_segformer(folder: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(6)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label={0: "background", 1: "subject"},
        label2id={"background": 0, "subject": 1},
    )
    SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 64, "width": 64}}), "utf-8"
    )


def without_weight(folder: Path, name: str) -> None:
    """Take one weight out of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _decoder() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
        "iou_head_depth": 2,
    }


def _owl_settings() -> dict[str, Any]:
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 16,
            "max_position_embeddings": 12,
            **layers,
            **_MARKS,
        },
        "vision_config": {"hidden_size": 16, "image_size": SIDE, "patch_size": 16, **layers},
        "projection_dim": 16,
    }


def _save_owl(folder: Path, model: Any) -> None:
    import tiny_stack

    model.eval().save_pretrained(folder)
    tiny_stack.tokenizer(folder / "words").save_pretrained(folder)


def _save_bert_words(folder: Path) -> None:
    """The ids of marks are BERT's own: GroundingDINO knows them by number."""
    from transformers import BertTokenizer

    words = [f"[unused{number}]" for number in range(1050)]
    marks = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for number, mark in marks.items():
        words[number] = mark
    words[1030 : 1030 + len(WORDS)] = WORDS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
