"""timm's classifier of a checkpoint as torch users serve it: eager, fp32, on the CPU.

What the rival servers have in common. Nothing of ours is in it: Pillow decodes, timm makes the
transform that the checkpoint's configuration names, torch runs the model as timm built it.

    >>> classifier = TorchClassifier(Path("runs/b16"), threads=2)
    >>> classifier.answers(torch.stack([classifier.read(jpeg)]))
    [{'label': 'benign', 'probability': 0.41, 'decision': 'benign'}]

Source of how it is opened and read: timm's documentation, "Quick start" (`create_model`,
`resolve_data_config`, `create_transform`).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PATH = "/v1/classify"
"""Where rivals answer too, so that one load generator asks all."""
READY_PATH = "/health"


class TorchClassifier:
    """A model and its transform; `threads` are torch's within an operator.

    Raises:
        FileNotFoundError: the checkpoint has no `classifier/`.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import timm
        import torch
        from safetensors.torch import load_file
        from timm.data import create_transform, resolve_data_config

        torch.set_num_threads(threads)
        folder = checkpoint / "classifier"
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
        model.load_state_dict(load_file(folder / "model.safetensors"))
        self._model = model.eval()
        data = resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
        self._transform: Any = create_transform(**data)
        self._names: list[str] = config["label_names"]
        reading = config.get("dermaflux", {})
        self._temperature = float(reading.get("temperature", 1.0))
        self._threshold = float(reading.get("threshold", 0.5))

    def read(self, data: bytes) -> torch.Tensor:
        """A file -> float32 [3, H, W], normalised."""
        from PIL import Image

        tensor: torch.Tensor = self._transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return tensor

    def answers(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """float32 [B, 3, H, W] -> an answer each, in order."""
        import torch

        with torch.inference_mode():
            shares = torch.softmax(self._model(batch) / self._temperature, dim=1)
        found = []
        for probability in shares[:, self._names.index("malignant")].tolist():
            label = "malignant" if probability >= self._threshold else "benign"
            found.append({"label": label, "probability": probability, "decision": label})
        return found
