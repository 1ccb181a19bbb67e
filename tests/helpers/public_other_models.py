"""Public architectures for sound, video, series, and images with text. Name -> a case with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from public_cases import (
    CLASSES,
    IGNORED,
    SAMPLES,
    SIZES,
    VOCABULARY,
    Build,
    Case,
    Inputs,
    config_of,
    labels_of,
    next_labels_of,
    rows_of,
    text,
)
from torch import Tensor, nn

PATCHES = {"image_size": 32, "patch_size": 8}


def of_sound(kind: str, **changes: Any) -> Build:
    """Waves that are sorted into classes."""

    def build() -> Case:
        config = config_of(
            kind,
            num_labels=CLASSES,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 5),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            apply_spec_augment=False,
            classifier_proj_size=16,
            **changes,
        )
        batch = {"input_values": torch.randn(SAMPLES, 800), "labels": torch.randint(CLASSES, (SAMPLES,))}
        return Case(hf.AutoModelForAudioClassification.from_config(config), batch, rows_of)

    return build


def whisper() -> Case:
    config = config_of(
        "whisper",
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        decoder_start_token_id=1,
    )
    batch = {"input_features": torch.randn(SAMPLES, 8, 40), "labels": text(7)["labels"]}
    return Case(hf.WhisperForConditionalGeneration(config), batch, labels_of)


def spectrogram() -> Case:
    config = config_of(
        "audio-spectrogram-transformer",
        num_labels=CLASSES,
        patch_size=4,
        num_mel_bins=16,
        max_length=32,
        frequency_stride=4,
        time_stride=4,
    )
    batch = {"input_values": torch.randn(SAMPLES, 32, 16), "labels": torch.randint(CLASSES, (SAMPLES,))}
    return Case(hf.ASTForAudioClassification(config), batch, rows_of)


def video() -> Case:
    config = config_of("videomae", num_labels=CLASSES, num_frames=4, tubelet_size=2, **PATCHES)
    batch = {"pixel_values": torch.randn(SAMPLES, 4, 3, 32, 32), "labels": torch.randint(CLASSES, (SAMPLES,))}
    return Case(hf.VideoMAEForVideoClassification(config), batch, rows_of)


def captions() -> Case:
    config = hf.BlipConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "pad_token_id": 0,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "label_smoothing": 0.0,
        },
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **PATCHES),
    )
    batch = text() | {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}
    return Case(hf.BlipForConditionalGeneration(config), batch, next_labels_of)


def llava() -> Case:
    config = hf.LlavaConfig(
        text_config=config_of("llama", num_key_value_heads=2, head_dim=8),
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **PATCHES
        ),
        image_token_index=96,
        image_token_id=96,
        vision_feature_layer=-1,
    )
    batch = text(24, padded=False)
    batch["input_ids"][:, :16] = 96
    batch["input_ids"][:, 16:].clamp_(max=95)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :16] = IGNORED
    return Case(
        hf.LlavaForConditionalGeneration(config),
        batch | {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)},
        next_labels_of,
    )


def vilt() -> Case:
    config = config_of("vilt", num_labels=CLASSES, **PATCHES)
    batch = text()
    batch["labels"] = torch.rand(SAMPLES, CLASSES)
    m = hf.ViltForQuestionAnswering(config)
    return Case(m, batch | {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}, rows_of)


def series(kind: str) -> Build:
    def build() -> Case:
        config = config_of(
            kind,
            num_targets=1,
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            num_input_channels=2,
            d_model=16,
            ffn_dim=32,
            norm_type="layernorm",
            use_cls_token=False,
            num_parallel_samples=1,
            loss="mse",
            num_attention_heads=4,
        )
        cls = {"patchtst": hf.PatchTSTForPrediction, "patchtsmixer": hf.PatchTSMixerForPrediction}[kind]
        batch = {"past_values": torch.randn(SAMPLES, 16, 2), "future_values": torch.randn(SAMPLES, 4, 2)}
        return Case(cls(config), batch, rows_of)

    return build


def decisions() -> Case:
    config = config_of("decision_transformer", state_dim=4, act_dim=2, max_ep_len=32)

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        found = model(**{k: v for k, v in batch.items() if k != "target"})
        return (found.action_preds - batch["target"]).square().mean()

    batch = {
        "states": torch.randn(SAMPLES, 5, 4),
        "actions": torch.randn(SAMPLES, 5, 2),
        "rewards": torch.randn(SAMPLES, 5, 1),
        "returns_to_go": torch.randn(SAMPLES, 5, 1),
        "timesteps": torch.arange(5).repeat(SAMPLES, 1),
        "attention_mask": torch.ones(SAMPLES, 5),
        "target": torch.randn(SAMPLES, 5, 2),
    }
    return Case(hf.DecisionTransformerModel(config), batch, rows_of, loss)


def perceiver() -> Case:
    config = config_of(
        "perceiver",
        num_labels=CLASSES,
        num_latents=6,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        max_position_embeddings=16,
        hidden_size=None,
    )
    batch = text()
    batch["labels"] = torch.randint(CLASSES, (SAMPLES,))
    batch["inputs"] = batch.pop("input_ids")
    return Case(hf.PerceiverForSequenceClassification(config), batch, rows_of)


def images_in_text() -> Case:
    """Images of all samples one after the other, as patches, in the place of their tokens."""
    image, start, end = VOCABULARY - 1, VOCABULARY - 3, VOCABULARY - 2
    config = hf.Qwen2VLConfig(
        text_config={
            **SIZES,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        video_token_id=VOCABULARY - 4,
    )
    batch = text(16, padded=False)
    ids = batch["input_ids"].clamp_(max=VOCABULARY - 5)
    ids[:, 0], ids[:, 1:5], ids[:, 5] = start, image, end
    batch["labels"] = ids.clone()
    batch["labels"][:, :6] = IGNORED
    batch["pixel_values"] = torch.randn(SAMPLES * 16, 3 * 8 * 8)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * SAMPLES)
    batch["mm_token_type_ids"] = (ids == image).long()
    return Case(hf.Qwen2VLForConditionalGeneration(config), batch, next_labels_of)


OTHER_MODELS: dict[str, Build] = {
    "VideoMAE": video,
    "Whisper": whisper,
    "wav2vec 2.0": of_sound("wav2vec2"),
    "HuBERT": of_sound("hubert"),
    "WavLM": of_sound("wavlm"),
    "SEW": of_sound("sew", squeeze_factor=2),
    "Data2Vec audio": of_sound("data2vec-audio", conv_pos_kernel_size=3),
    "AST": spectrogram,
    "BLIP": captions,
    "LLaVA": llava,
    "Qwen2-VL": images_in_text,
    "ViLT": vilt,
    "PatchTST": series("patchtst"),
    "PatchTSMixer": series("patchtsmixer"),
    "Decision Transformer": decisions,
    "Perceiver": perceiver,
}
