"""Both sides of the benchmark of LoRA training: what each is told, so that they do the same work.

Options that one side has and the other lacks are switched off: no caption is dropped, nothing is
flipped, no average is kept, noise shares are uniform, the rate is constant.

    >>> plan.command("dermaflux", Path("run"), steps=40)
    ['python', '-m', 'training.lora', 'models/mini', '--data', 'dataset', '--out', 'run', ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import dataset
from dermaflux.errors import DatasetError, EngineError
from dermaflux.prompt import caption

SIDES: Final = ("dermaflux", "diffusers")
BARS: Final = {"dermaflux": "lora", "diffusers": "Steps"}
"""What their progress bars are called."""
ADAPTERS: Final = {"dermaflux": "adapter.safetensors",
                   "diffusers": "pytorch_lora_weights.safetensors"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What both sides are told; `dtype` is that of the frozen weights."""

    script: Path
    base: Path
    data: Path
    pictures: Path
    prompt: str
    text_length: int
    layers: tuple[str, ...]
    batch: int
    resolution: int
    rank: int
    device: str
    threads: int
    checkpointing: bool
    more: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def environment(self) -> dict[str, str]:
        """Of either side's process."""
        threads = str(self.threads)
        told = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        return told | ({"ACCELERATE_USE_CPU": "true"} if self.device == "cpu" else {})

    def command(self, side: str, out: Path, steps: int) -> list[str]:
        """The command line of a side that trains `steps` steps into `out`."""
        words = self._ours(out, steps) if side == "dermaflux" else self._theirs(out, steps)
        return [sys.executable, "-m", *map(str, words)]

    def _ours(self, out: Path, steps: int) -> list[Any]:
        kind = "fp32" if self.device == "cpu" else "bf16"
        return [
            "training.lora", self.base, "--data", self.data, "--out", out, "--steps", steps,
            "--batch", self.batch, "--rank", self.rank, "--alpha", self.rank,
            "--sizes", self.resolution, "--aspect", 1, "--turns", 1, "--balance", "none",
            "--caption-dropout", 0, "--timesteps", "uniform", "--guidance", 1, "--ema", 0,
            "--rate", 1e-4, "--decay", 1e-4, "--warmup", 0, "--schedule", "constant",
            "--clip", 1, "--base-dtype", kind, "--device", self.device,
            "--threads", self.threads, "--save-minutes", 1e6,
            *(["--checkpointing"] if self.checkpointing else []), *self.more,
        ]  # fmt: skip

    def _theirs(self, out: Path, steps: int) -> list[Any]:
        return [
            "benchmarks.diffusers_script", self.script,
            "--pretrained_model_name_or_path", self.base,
            "--instance_data_dir", self.pictures, "--instance_prompt", self.prompt,
            "--output_dir", out, "--max_train_steps", steps, "--checkpointing_steps", 10**9,
            "--train_batch_size", self.batch, "--rank", self.rank,
            "--lora_layers", ",".join(self.layers), "--resolution", self.resolution,
            "--center_crop", "--cache_latents", "--max_sequence_length", self.text_length,
            "--guidance_scale", 1, "--weighting_scheme", "none", "--optimizer", "AdamW",
            "--learning_rate", 1e-4, "--adam_weight_decay", 1e-4, "--lr_scheduler", "constant",
            "--lr_warmup_steps", 0, "--max_grad_norm", 1, "--seed", 0,
            "--mixed_precision", "no" if self.device == "cpu" else "bf16",
            *(["--gradient_checkpointing"] if self.checkpointing else []),
        ]  # fmt: skip


def link_pictures(data: Path, folder: Path, batch: int) -> str:
    """Links to the pictures of the training split, as many as make whole batches, in a new
    `folder`; returns the first one's caption.

    Raises:
        DatasetError: it is no dataset, or has too few pictures for one batch.
    """
    records = [record for record in dataset.read(data) if record.split == "train"]
    if len(records) < batch:
        raise DatasetError(
            f"{data} has {len(records)} pictures in its training split; a batch needs {batch}: "
            "give a smaller --batch"
        )
    folder.mkdir(parents=True)
    for number, record in enumerate(records[: len(records) // batch * batch]):
        file = (data / record.file_name).resolve()
        (folder / f"{number:06}{file.suffix}").symlink_to(file)
    return records[0].text or caption(records[0].lesion)


def weights_of(file: Path) -> int:
    """How many numbers LoRA's factors in a safetensors file are.

    Raises:
        EngineError: the file is not there.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise EngineError(f"training ended without {file.name}; there is nothing to compare")
    with safe_open(file, framework="numpy") as content:
        shapes = [
            content.get_slice(name).get_shape()
            for name in content.keys()  # noqa: SIM118 - it is no mapping
            if name.endswith(("lora_A.weight", "lora_B.weight"))
        ]
    return sum(rows * columns for rows, columns in shapes)
