"""A checkpoint of random weights in half a second: the shape of FLUX.1, not that of `models/mini`.

Its latent channels, scale, text lengths and defaults all differ from the embedded default's, so a
test that passes on both has nothing of either written into the code.
"""

from __future__ import annotations

import json
from pathlib import Path

CAPTIONS = (
    "dermoscopic image of a benign lesion, nevus, symmetric, regular border, light brown",
    "dermoscopic image of a malignant lesion, melanoma, asymmetric, irregular border, black",
)
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")


def write_checkpoint(
    folder: Path, *, guided: bool = True, provenance: bool = True, shifting: bool = True
) -> Path:
    """A Flux pipeline and a ViT with random weights; needs torch, diffusers, transformers, timm."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    _write_tokenizer(folder / "tokenizer", length=20, begin=True)
    _write_tokenizer(folder / "tokenizer_2", length=24, begin=False)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shifting),
        vae=AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=400,
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=20,
                bos_token_id=1,
                eos_token_id=3,
                pad_token_id=0,
            )
        ),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=400, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ),
        tokenizer_2=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipeline.save_pretrained(folder)
    _write_classifier(folder / "classifier")
    if provenance:
        content = {
            "name": "tiny",
            "base": None,
            "created": "2026-01-01T00:00:00Z",
            "wording": "dermaflux-1",
            "defaults": {
                "steps": 3,
                "guidance": 2.5 if guided else None,
                "height": 32,
                "width": 32,
                "text_length": 24,
            },
            "ingredients": [],
            "licence": "Apache-2.0",
            "training": {},
        }
        (folder / "provenance.json").write_text(json.dumps(content))
    return folder


def _write_tokenizer(folder: Path, length: int, begin: bool) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if begin else "$A <eos>",
        special_tokens=[("<bos>", 1), ("<eos>", 3)],
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=length)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_classifier(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.6, 0.7],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
        },
        "label_names": ["benign", "malignant"],
        "dermaflux": {"temperature": 1.5, "threshold": 0.4, "abstain": [0.3, 0.5]},
    }
    (folder / "config.json").write_text(json.dumps(config))
