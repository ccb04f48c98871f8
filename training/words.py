"""Tokenizers and small text encoders of the embedded default, of FLUX.1's two kinds.

Both tokenizers are byte-level BPE trained on the captions, so that any UTF-8 prompt has tokens.
`tokenizer.json` holds length, padding and truncation, since Flux does not mask its text: an image
depends on how many padding tokens stand behind the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

# CLIPTextModel pools at the first <eos>, but at the highest id where eos_token_id is 2: keep off 2.
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
PAD, BOS, _, EOS = range(4)


def train_tokenizer(
    captions: Iterable[str], *, length: int, vocabulary: int, begin: bool
) -> tokenizers.Tokenizer:
    """Lower-casing byte-level BPE, padded and cut to `length`; `begin` adds <bos> (CLIP does)."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if begin else "$A <eos>",
        special_tokens=[("<bos>", BOS), ("<eos>", EOS)],
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>", length=length)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, length: int) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json` that transformers 4.57 and 5 both load.

    transformers 5 would name the class `TokenizersBackend`, which 4.57 does not know; and 4.57
    would take `add_prefix_space` for false where nothing is said, and so give other ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "truncation_side": "right",
        "add_prefix_space": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_clip(encoder: CLIPTextModel, folder: Path, shard: str) -> None:
    """Write a CLIP text encoder that transformers 4.57 and 5 both load.

    transformers 5 leaves out the prefix `text_model.`, without which 4.57 finds no tensor and runs
    on random weights; 5 reads both.
    """
    state = {f"text_model.{name}": value for name, value in encoder.state_dict().items()}
    encoder.save_pretrained(folder, state_dict=state, max_shard_size=shard)


def token_ids(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [N, length]."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def clip_encoder(width: int, layers: int, vocabulary: int, length: int) -> CLIPTextModel:
    """A CLIP text encoder with fresh weights; its pooled output is [N, width]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=length,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def t5_encoder(width: int, layers: int, vocabulary: int) -> T5EncoderModel:
    """A T5 encoder with fresh weights; its last hidden state is [N, length, width]."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )
