"""What `benchmarks.gpu` measures: FLUX.1's public shapes, images to draw, and goals for them.

Weights are random: speed depends on shapes alone. `REDUCED` has the same parts in miniature, for a
machine without a GPU, where the script is tried and nothing is measured.

Sources: the configs of black-forest-labs/FLUX.1-dev and FLUX.1-schnell as diffusers writes them,
T5 v1.1 XXL's encoder, CLIP ViT-L/14's, timm's vit_base_patch16_224.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dermaflux.bundle import ModelSpec
from dermaflux.flow import Schedule

SEED: Final = 0
GUIDANCE: Final = 3.5
DEV: Final = "dev 1024"
"""The image that sides are compared on."""


@dataclass(frozen=True)
class Image:
    """An image to draw: `side` pixels, `steps`, `text` tokens; `goals` by side, in seconds."""

    name: str
    side: int
    steps: int
    text: int
    schedule: Schedule
    guided: bool
    goals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """Parts and images of one size of things; `estimates` is whether rows take as long as said."""

    name: str
    transformer: Mapping[str, Any]
    decoder: Mapping[str, Any]
    t5: Mapping[str, Any]
    clip: Mapping[str, Any]
    images: tuple[Image, ...]
    classifier: Mapping[str, Any]
    classifier_batch: int
    classifier_goal: float | None
    matrix: int
    copied: int
    """Rows of the square matrices, and bytes, that rates are measured with."""
    rounds: int

    def model(self, image: Image) -> ModelSpec:
        """What the denoising loop must know."""
        return ModelSpec(
            latent_channels=self.decoder["latent_channels"],
            scale=2 ** (len(self.decoder["block_out_channels"]) - 1),
            scaling_factor=self.decoder["scaling_factor"],
            shift_factor=self.decoder["shift_factor"],
            text_length=image.text,
            clip_length=77,
            guidance_embeds=image.guided,
        )

    def image(self, name: str) -> Image:
        """By name."""
        return next(one for one in self.images if one.name == name)

    def tokens(self, image: Image) -> int:
        """Image tokens: patches of 2 x 2 latent cells."""
        return (image.side // (2 * self.model(image).scale)) ** 2


_DEV: Final = Schedule(shift=3.0, use_dynamic_shifting=True)
_SCHNELL: Final = Schedule(shift=1.0)
_DECODER: Final = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}

FULL: Final = Shape(
    name="FLUX.1",
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    decoder=_DECODER,
    t5={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    clip={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    images=(
        Image("dev 1024", 1024, 28, 512, _DEV, True, {"lossless": 3.4, "fp8": 2.4, "cached": 1.6}),
        Image("schnell 1024", 1024, 4, 256, _SCHNELL, False, {"lossless": 0.45, "fp8": 0.30}),
        Image("schnell 512", 512, 4, 256, _SCHNELL, False, {"lossless": 0.15, "fp8": 0.10}),
    ),
    classifier={"model_name": "vit_base_patch16_224", "num_classes": 2},
    classifier_batch=256,
    classifier_goal=8000.0,
    matrix=8192,
    copied=2**32,
    rounds=3,
)
"""Images a second for the classifier; goals count the transformer and the decoder, text cached."""

REDUCED: Final = Shape(
    name="reduced",
    transformer={
        **FULL.transformer,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (8, 12, 12),
    },
    decoder={**_DECODER, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
    t5={**FULL.t5, "vocab_size": 128, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 1},
    clip={
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 2,
    },
    images=(
        Image("dev 1024", 128, 8, 32, _DEV, True),
        Image("schnell 1024", 128, 2, 16, _SCHNELL, False),
        Image("schnell 512", 64, 2, 16, _SCHNELL, False),
    ),
    classifier={
        "model_name": "vit_tiny_patch16_224",
        "num_classes": 2,
        "depth": 2,
        "img_size": 32,
    },
    classifier_batch=2,
    classifier_goal=None,
    matrix=256,
    copied=2**22,
    rounds=2,
)
