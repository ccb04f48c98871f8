"""Captions from a vision-language model, whichever image-text-to-text model transformers opens.

Llama 3.2 Vision is the paper's. Its licence does not give its multimodal models to persons and
companies in the EU, and asks for "Built with Llama" where its answers train another model. Any
other model takes its place: LLaVA, Idefics3, Qwen2-VL, PaliGemma, Gemma 3. Weights are read from
safetensors only, from local disk unless a download is asked for; no code of a model is run.

    >>> captioner = VisionCaptioner(Path("dataset"), Asking("Llama-3.2-11B-Vision-Instruct"))
    >>> captioner.answer([picture])
    [{'text': 'The mole is round, with a smooth border ...', 'cut': False, 'dtype': 'bfloat16'}]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dermaflux.dataset import Record
from dermaflux.errors import EngineError, ImageError
from dermaflux.images import decode_upload
from training import caption_journal
from training.caption_run import MAX_PIXELS, VERSION, Answer, Failed, Picture
from training.caption_text import Asking, text_of
from training.caption_weights import identity, opened


class VisionCaptioner:
    """A model and its processor, opened when the first picture is asked for.

    Raises:
        EngineError: the model's folder or its files are not there.
    """

    def __init__(self, folder: Path, asking: Asking) -> None:
        self.folder = folder
        self.asking = asking
        self.batch = asking.batch
        self.model = identity(asking)
        self._opened: tuple[Any, Any] | None = None

    def key(self, picture: Picture) -> str:
        """See `Captioner.key`. The template is no part of it: it is filled in afterwards."""
        # A folder's hash says it all; a copy elsewhere is the same model.
        model = self.model.get("sha256") or [self.model["name"], self.model["revision"]]
        decoding = {**self.asking.decoding, "dtype": self.asking.dtype}
        prompt = self._prompt(picture.record)
        return caption_journal.key("model", VERSION, model, decoding, prompt, picture.sha256)

    def answer(self, pictures: Sequence[Picture]) -> list[Answer]:
        """See `Captioner.answer`: `text` [str], and `cut` [bool] where it has no end."""
        answers: list[Answer] = [Failed("")] * len(pictures)
        good: list[tuple[int, Picture, Image.Image]] = []
        for place, picture in enumerate(pictures):
            try:
                image = self._image(picture.record)
                good.append((place, picture, image))
            except (ImageError, OSError) as error:
                answers[place] = Failed(str(error))
        try:
            said = self._generate([one[1:] for one in good]) if good else []
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            said = [self._alone(*one[1:]) for one in good] if len(good) > 1 else [_failed(error)]
        for (place, _, _), one in zip(good, said, strict=True):
            answers[place] = one
        return answers

    def captioned(self, record: Record, answer: Mapping[str, Any]) -> Record:
        """See `Captioner.captioned`."""
        text = text_of(record, str(answer["text"]), self.asking.template, self.asking.patient)
        told = {
            "version": VERSION,
            "captioner": "model",
            "model": self.model,
            "prompt": self.asking.prompt,
            "template": self.asking.template,
            "patient": self.asking.patient,
            "label_blind": "{label}" not in self.asking.prompt,
            "decoding": {**self.asking.decoding, "dtype": answer["dtype"], "cut": answer["cut"]},
        }
        return replace(record, text=text, more={**record.more, "caption": told})

    def _prompt(self, record: Record) -> str:
        return self.asking.prompt.replace("{label}", record.label)

    def _image(self, record: Record) -> Image.Image:
        return decode_upload((self.folder / record.file_name).read_bytes(), MAX_PIXELS)

    def _alone(self, picture: Picture, image: Image.Image) -> Answer:
        """One picture of a batch that failed: which of them it was shows now."""
        try:
            return self._generate([(picture, image)])[0]
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            return _failed(error)

    def _generate(self, pictures: Sequence[tuple[Picture, Image.Image]]) -> list[Answer]:
        import torch

        if self._opened is None:
            self._opened = opened(self.asking)
        model, processor = self._opened
        texts = [_conversation(processor, self._prompt(one.record)) for one, _ in pictures]
        begin = processor.tokenizer.bos_token
        inputs = processor(
            images=[[image] for _, image in pictures],
            text=texts,
            padding=True,
            # A chat template writes the first token itself.
            add_special_tokens=not (begin and texts[0].startswith(begin)),
            return_tensors="pt",
        ).to(model.device, model.dtype)
        drawn = []
        if self.asking.temperature > 0:
            seeds = [f"{self.asking.seed} {picture.sha256}" for picture, _ in pictures]
            drawn = [_sampler(seeds, self.asking.temperature, self.asking.top_p)]
        with torch.inference_mode():
            tokens = model.generate(**inputs, logits_processor=drawn)
        asked = inputs["input_ids"]
        # Encoders with a decoder, and some others, give their answer alone.
        if torch.equal(tokens[:, : asked.shape[1]], asked):
            tokens = tokens[:, asked.shape[1] :]
        ends = torch.tensor(_ends(model), device=tokens.device, dtype=tokens.dtype)
        ended = torch.isin(tokens, ends).any(dim=1).tolist()
        said = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        dtype = str(model.dtype).removeprefix("torch.")
        return [
            {"text": text.strip(), "cut": not whole, "dtype": dtype}
            if text.strip()
            else Failed("the model said nothing")
            for text, whole in zip(said, ended, strict=True)
        ]


def _conversation(processor: Any, prompt: str) -> str:
    """The prompt as the model was trained to be asked: its chat template, or picture and text."""
    if processor.chat_template is None:
        return f"{getattr(processor, 'image_token', '')}{prompt}"
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _sampler(seeds: Sequence[str], temperature: float, top_p: float) -> Any:
    """Draws row i's tokens by seeds[i] alone, as a processor of logits before an argmax.

    The largest of logits / temperature + Gumbel noise is a draw from their softmax (the
    Gumbel-max trick; Maddison et al., A* Sampling, 2014).
    """
    import torch
    from transformers import LogitsProcessor, TopPLogitsWarper

    generators = [
        torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
        for seed in seeds
    ]
    nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    class Sampler(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.float() / temperature
            if nucleus is not None:
                scores = nucleus(input_ids, scores)
            draws = [torch.rand(scores.shape[1], generator=one) for one in generators]
            uniform = torch.stack(draws).clamp_(1e-20, 1 - 1e-7).to(scores.device)
            return scores - torch.log(-torch.log(uniform))

    return Sampler()


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]


def _failed(error: Exception) -> Failed:
    """What a library raised for one picture; what stops every picture is raised on.

    Raises:
        EngineError: the device's memory is full with this one picture.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        raise EngineError(
            f"the device's memory is full with one picture ({str(error).splitlines()[0]}); use "
            "--dtype bf16, --device auto, or a smaller model"
        ) from error
    return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
