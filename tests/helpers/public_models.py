"""Public architectures, as people train them. MODELS[name] -> a case with random weights; REFUSED[name] -> a case that
is not measured, and the words that say why."""

from __future__ import annotations

import peft
import torch
import transformers as hf
from public_adapters import ADAPTERS, adapted
from public_cases import CLASSES, SAMPLES, SIZES, Build, Case, Inputs, config_of, images, rows_of, text
from public_decoders import DECODERS
from public_encoders import ENCODERS
from public_image_models import IMAGE_MODELS, PATCHES
from public_other_models import OTHER_MODELS
from torch import Tensor, nn

MODELS: dict[str, Build] = {**DECODERS, **ENCODERS, **ADAPTERS, **IMAGE_MODELS, **OTHER_MODELS}

#: One of each family; the others take longer together.
FIRST = [
    "GPT-2",
    "Llama",
    "Qwen3",
    "Gemma 2",
    "Mixtral",
    "BERT, masked tokens",
    "T5",
    "ViT",
    "Swin",
    "Whisper",
    "Mamba",
    "LoRA on Llama",
]


def contrast() -> Case:
    """Images and texts that are told apart from each other's."""
    config = hf.CLIPConfig(
        text_config={**SIZES, "max_position_embeddings": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | PATCHES,
        projection_dim=16,
    )

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        found: Tensor = model(**batch, return_loss=True).loss
        return found

    batch = text(padded=False)
    batch["input_ids"][:, -1] = 2  # the end of a text, where CLIP reads it
    del batch["labels"]
    return Case(hf.CLIPModel(config), batch | {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)}, rows_of, loss)


def batch_norm() -> Case:
    """A convolutional network whose layers take statistics over the batch."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return Case(hf.ResNetForImageClassification(config), images(), rows_of)


def video_frames() -> Case:
    """Frames, of whose class tokens those of the first sample's frames are taken for all samples."""
    config = config_of("timesformer", num_labels=CLASSES, num_frames=4, **PATCHES)
    batch = {"pixel_values": torch.randn(SAMPLES, 4, 3, 32, 32), "labels": torch.randint(CLASSES, (SAMPLES,))}
    return Case(hf.TimesformerForVideoClassification(config), batch, rows_of)


REFUSED: dict[str, tuple[Build, str]] = {
    "CLIP, contrastive": (contrast, "the model mixes its samples"),
    "ResNet, BatchNorm": (batch_norm, "normalises by the statistics of the batch"),
    "TimeSformer": (video_frames, "position_embeddings.*rows of its gradient have parts of several samples"),
    "LoHa": (
        adapted("llama", lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        "goes through the autograd Function HadaWeight",
    ),
    "AdaLoRA": (
        adapted("llama", lambda: peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        "comes to the model's output without meeting the batch",
    ),
}
