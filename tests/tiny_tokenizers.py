"""Tokenizers in the files that FLUX.1 is downloaded with, of small vocabularies trained here.

CLIP's `vocab.json` holds 256 letters for bytes, the same letters at a word's end, one token per
line of `merges.txt`, and two special tokens. T5's `spiece.model` is a unigram model with the
normalizer of sentencepiece compiled in, and no byte fallback; a hundred sentinels follow it.
"""

from __future__ import annotations

import io
import json
import random
import unicodedata
from pathlib import Path

from tests.tiny import CAPTIONS

TEXT = (
    *CAPTIONS,
    "the patient's forearm itches & bleeds; 3 mm wide, it'll grow, they've seen it, I'm sure",
    "naïve café Ünïcode lésion, 皮膚 病変, ЁЛКА меланома, α-β γ, १२३ ４５６",
)
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def odd_prompts() -> list[str]:
    """Hundreds of texts that tokenizers are known to disagree on, all that UTF-8 can hold."""
    texts = ["", " ", "lesion", *TEXT, *(f"{text} " * 40 for text in TEXT), "lesion " * 1500]
    texts += ["x" * 10_000, "皮" * 3000, "🩺" * 500, "a\u0301" * 400, "lesion, " * 7 + "nevus"]
    # Around the lengths that are padded and cut to.
    texts += [" ".join(["lesion"] * count) for count in range(15, 80)]
    marks = (BEGIN, END, "<pad>", "</s>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_99>", "</w>")
    for mark in (*marks, "<|StartOfText|>", "<extra_id_100>", "[PAD]", "▁", "Ġ"):
        texts += [
            mark,
            f"a {mark} lesion",
            f"a{mark}lesion",
            f" {mark} {mark}{mark} ",
            mark.upper(),
        ]
    for entity in ("&amp;", "&lt;b&gt;", "&#39;", "&nbsp;", "&amp;amp;", "&eacute;", "â€™", "Ã©"):
        texts += [entity, f"benign {entity} lesion", f"3{entity}4"]
    control = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA1), 0xAD, 0xFEFF, 0xFFFD)]
    spaces = (
        "\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u200d\u2060\u200e\u202e"
    )
    texts += [f"benign{character}lesion {character} nevus" for character in (*control, *spaces)]
    texts += ["  a   lesion\t\tof \n\n skin\r\n ", "\n", "\t lesion", "lesion \u3000"]
    words = (
        "naïve café Ünïcode",
        "ﬁne ﬂat ½ ² ™ Å Ω ①",
        "각 한국어",
        "ｆｕｌｌ ＷＩＤＴＨ",
        "İıŞß ẞ ΐ ΣΑΣ",
    )
    texts += [
        unicodedata.normalize(form, word)
        for word in words
        for form in ("NFC", "NFD", "NFKC", "NFKD")
    ]
    texts += ["👩🏽‍⚕️ 🩺🏳️‍🌈 🇨🇭 ☠️ 1️⃣", "مرحبا بالعالم", "שלום", "नमस्ते दुनिया १२३", "ไทย ภาษา", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢"]
    texts += [
        "it's they've I'll we'd I'm you're IT'S don’t",
        "A-b_c.d/e\\f@g#h$i%j^k*l(m)n",
        "3.14 1,000",
    ]
    letters = random.Random(0)
    blocks = ((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE00))
    blocks += ((0x2000, 0x2C00), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF))
    for number in range(300):
        low, high = blocks[number % len(blocks)]
        others = "".join(chr(letters.randrange(low, high)) for _ in range(letters.randrange(1, 40)))
        texts.append(f"a {others} lesion{others[:2]}")
    return texts


def write_clip(folder: Path, length: int, merges: int = 300) -> int:
    """`vocab.json`, `merges.txt` and the two settings; the number of tokens, as the embedding's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {
        name: {
            "content": token,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        for name, token in (("bos_token", BEGIN), ("eos_token", END), ("unk_token", END))
    }
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": END}))
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(vocabulary[token["content"]]): {**token, "special": True}
            for token in (special["bos_token"], special["eos_token"])
        },
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_t5(folder: Path, length: int) -> int:
    """`spiece.model` and the two settings; the number of tokens, sentinels included."""
    import sentencepiece

    # Of equal sentences it would learn letters: a word pays where its neighbours change.
    order, words = random.Random(0), " ".join(TEXT).split()
    sentences = [" ".join(order.sample(words, 8)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=250,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special_map = {**special, "additional_special_tokens": sentinels}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    places = {0: "<pad>", 1: "</s>", 2: "<unk>"}
    places |= {pieces + 99 - number: sentinel for number, sentinel in enumerate(sentinels)}
    settings = {
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(place): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for place, token in sorted(places.items())
        },
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": True,
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": length,
        "tokenizer_class": "T5Tokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return pieces + 100
