"""Public architectures for images. Name -> a case with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from public_cases import CLASSES, SAMPLES, Build, Case, Inputs, config_of, images, rows_of
from torch import Tensor, nn
from torch.nn import functional as F

PATCHES = {"image_size": 32, "patch_size": 8}


def of_images(kind: str, of: Any = hf.AutoModelForImageClassification, **changes: Any) -> Build:
    """Images that are sorted into classes."""

    def build() -> Case:
        make = getattr(of, "from_config", of)
        return Case(make(config_of(kind, num_labels=CLASSES, **changes)), images(), rows_of)

    return build


def masked_images() -> Case:
    """Patches that are predicted, of which the mask says which."""
    config = config_of("vit", encoder_stride=8, **PATCHES)
    mask = torch.zeros(SAMPLES, 16, dtype=torch.bool)
    mask[:, ::3] = True
    batch = images() | {"bool_masked_pos": mask}
    del batch["labels"]
    return Case(hf.ViTForMaskedImageModeling(config), batch, rows_of)


def segmentation() -> Case:
    config = config_of(
        "segformer",
        num_labels=CLASSES,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    model = hf.SegformerForSemanticSegmentation(config)
    model.decode_head.batch_norm = nn.GroupNorm(4, 16)  # its own mixes samples
    batch = images() | {"labels": torch.randint(CLASSES, (SAMPLES, 32, 32))}
    return Case(model, batch, lambda b: b["labels"].numel())


def detection() -> Case:
    """Classes of queries; the backbone's norms are frozen ones, as usual."""
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = config_of(
        "detr",
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=6,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["queries"].flatten())

    batch = {"pixel_values": torch.randn(SAMPLES, 3, 64, 64), "queries": torch.randint(CLASSES, (SAMPLES, 6))}
    return Case(hf.DetrForObjectDetection(config), batch, lambda b: b["queries"].numel(), loss)


def segment_anything() -> Case:
    """Masks at points."""
    config = hf.SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16},
    )
    config.prompt_encoder_config.image_embedding_size = 8

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        found = model(pixel_values=batch["pixel_values"], input_points=batch["points"], multimask_output=False)
        return (found.pred_masks - batch["masks"]).square().mean()

    batch = {
        "pixel_values": torch.randn(SAMPLES, 3, 64, 64),
        "points": torch.rand(SAMPLES, 1, 1, 2) * 60,
        "masks": torch.randn(SAMPLES, 1, 1, 32, 32),
    }
    return Case(hf.SamModel(config), batch, rows_of, loss)


IMAGE_MODELS: dict[str, Build] = {
    "ViT": of_images("vit", **PATCHES),
    "ViT, masked patches": masked_images,
    "DeiT": of_images("deit", hf.DeiTForImageClassification, **PATCHES),
    "BEiT": of_images("beit", use_relative_position_bias=True, layer_scale_init_value=0.1, **PATCHES),
    "DINOv2": of_images("dinov2", **PATCHES),
    "DINOv2, registers": of_images("dinov2_with_registers", **PATCHES),
    "Swin": of_images(
        "swin",
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        image_size=32,
        hidden_size=None,
        num_hidden_layers=None,
        num_attention_heads=None,
    ),
    "Swin V2": of_images(
        "swinv2",
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        image_size=32,
        hidden_size=None,
        num_hidden_layers=None,
        num_attention_heads=None,
    ),
    "ConvNeXt": of_images("convnext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "ConvNeXt V2": of_images("convnextv2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "PoolFormer": of_images(
        "poolformer",
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
    ),
    "FocalNet": of_images(
        "focalnet",
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        hidden_sizes=[8, 16],
    ),
    "PVT": of_images(
        "pvt",
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    "SegFormer": of_images(
        "segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    "SegFormer, segmentation": segmentation,
    "DETR": detection,
    "SAM": segment_anything,
}
