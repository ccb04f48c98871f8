"""PyTorch as it is: the reference that every other engine is compared with. And torch made fast.

Opens parts of a checkpoint (not of a bundle) behind the tensor names of a bundle's graphs. With
`dermaflux.engines.parts` and the `flux` modules beside it the only part of the runtime that imports
torch, so nothing imports it until it was asked for.

    >>> load(Path("models/mini"), "transformer").run({"hidden_states": tokens, ...})
    >>> load(Path("models/mini"), "transformer", fast=True)     # dermaflux.engines.flux
    >>> load(Path("models/mini"), "transformer", compile=True)  # the same, blocks compiled
    >>> load(Path("models/mini"), "transformer", precision="fp8", device="cuda")

The plain call runs diffusers' own forward: exports are held to it, so nothing of ours is in it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import torch
from tokenizers import Tokenizer

from dermaflux import vocabulary
from dermaflux.bundle import GENERATOR_PARTS, TOKENIZERS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import EAGER, Array, Arrays, flux_engine
from dermaflux.engines.flux_engine import FluxEngine
from dermaflux.engines.flux_fp8 import LOW
from dermaflux.engines.parts import module
from dermaflux.errors import BundleError, EngineError, translated
from dermaflux.tokens import Tokens

PRECISIONS: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
FP8: Final = "fp8"
_LOADING: Final = threading.Lock()
"""`from_pretrained` switches the whole process to the device "meta" meanwhile: parts that are
loaded beside each other stay without weights."""


@dataclass(frozen=True)
class EagerEngine:
    """A part of a checkpoint in torch. Calls from several threads take turns."""

    model: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    dtype: torch.dtype
    device: torch.device
    lock: threading.Lock
    name: str = EAGER

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.bind({})(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: constant inputs move to the device once."""
        held = {name: self._tensor(value) for name, value in constant.items()}

        def step(varying: Arrays) -> dict[str, Array]:
            given = {**held, **{name: self._tensor(value) for name, value in varying.items()}}
            if given.keys() != set(self.inputs):
                raise EngineError(f"the part takes {sorted(self.inputs)}, not {sorted(given)}")
            with self.lock, torch.inference_mode():
                results = self.model(*(given[name] for name in self.inputs))
            arrays = (result.float().cpu().numpy() for result in results)
            return dict(zip(self.outputs, arrays, strict=True))

        return step

    def _tensor(self, value: Array) -> torch.Tensor:
        tensor = torch.from_numpy(value.copy()).to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


@overload
def load(
    checkpoint: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> EagerEngine: ...


@overload
def load(
    checkpoint: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = None,
    device: str = "cpu",
    compile: bool = False,
    threads: int | None = None,
    fast: bool = False,
) -> EagerEngine | FluxEngine: ...


def load(
    checkpoint: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = None,
    device: str = "cpu",
    compile: bool = False,
    threads: int | None = None,
    fast: bool = False,
) -> EagerEngine | FluxEngine:
    """The engine of a part.

    `precision` names a dtype (`fp32`, `bf16`, `fp16`), or is `fp8`: that of the transformer's
    blocks; other parts are in bf16 then. `fast` runs the transformer with our own forward, equal to
    diffusers' within rounding (`dermaflux.engines.flux`), as `compile` and `fp8` do too; on CUDA
    its blocks are then compiled and its forward is a graph. A fast decoder has its channels last,
    and is compiled on CUDA. `compile` puts torch.compile around other parts and around blocks on a
    CPU too: it pays after minutes. `threads` is torch's number for the whole process: torch has no
    other.

    Raises:
        EngineError: the part cannot be opened, torch has no such device, or no such precision.
    """
    if precision is not None and precision not in (*PRECISIONS.values(), FP8):
        known = ", ".join((*PRECISIONS.values(), FP8))
        raise EngineError(f"the eager engine has no precision {precision!r}; use {known}")
    place = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if precision is not None:
        named = {name: kind for kind, name in PRECISIONS.items()}
        dtype = named.get(precision, torch.bfloat16)
    if part == "transformer" and (fast or compile or precision == FP8):
        return flux_engine.opened(
            checkpoint / part,
            dtype,
            place,
            precision=precision or PRECISIONS[dtype],
            compile=compile,
            low=LOW if precision == FP8 else (),
        )
    with _LOADING:
        part_module: Any = module(checkpoint, part, dtype).to(place)
    if fast and part == "vae_decoder":
        # Convolutions' own order, faster on a CPU too, and what compilers ask for.
        part_module.to(memory_format=torch.channels_last)
        compile = compile or place.type == "cuda"
    return EagerEngine(
        model=torch.compile(part_module) if compile else part_module,
        inputs=part_module.inputs,
        outputs=part_module.outputs,
        precision=PRECISIONS[dtype],
        dtype=dtype,
        device=place,
        lock=threading.Lock(),
    )


def torch_device(name: str) -> torch.device:
    """A device that torch computes on here.

    Raises:
        EngineError: there is none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    # A torch built without CUDA asserts; "meta" has no numbers; others raise RuntimeError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise EngineError(f"torch cannot use the device {name!r}: {why}. Use cpu") from error
    return device


def tokenizers(checkpoint: Checkpoint) -> dict[str, Tokens]:
    """The tokenizers of a checkpoint at its lengths, as FluxPipeline makes them of any files.

    A downloaded FLUX.1 has no `tokenizer.json` for CLIP, and none that pads.

    Raises:
        BundleError: a tokenizer's files are missing or damaged, or it gives ids that its text
            encoder has no row for.
    """
    index = json.loads((checkpoint.path / "model_index.json").read_text(encoding="utf-8"))
    lengths = (checkpoint.model.clip_length, checkpoint.model.text_length)
    made: dict[str, Tokens] = {}
    for name, encoder, length in zip(TOKENIZERS, GENERATOR_PARTS[:2], lengths, strict=True):
        folder = checkpoint.path / name
        found = list(vocabulary.problems(folder))
        if found:
            raise BundleError(f"{folder} is not a tokenizer that can be converted: {found[0]}")
        tokens = Tokens(_tokenizer(folder, index.get(name), length), length, str(folder))
        vocabulary.require_rows(checkpoint.path, name, encoder, tokens.largest)
        made[name] = tokens
    return made


def _tokenizer(folder: Path, entry: Any, length: int) -> Tokenizer:
    """The class that `model_index.json` names, for AutoTokenizer may make another of the files."""
    import transformers

    kind: Any = getattr(transformers, str(entry[1]), None) if isinstance(entry, list) else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)
    if not known:
        raise BundleError(
            f"model_index.json has {entry} for {folder.name}, which is no tokenizer of "
            f"transformers {transformers.__version__}; name one, such as PreTrainedTokenizerFast"
        )
    with translated(BundleError, f"{folder} is not a tokenizer that can be converted"):
        opened: Any = kind.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(opened.backend_tokenizer.to_str())
    if opened.pad_token is None:
        raise BundleError(
            f"{folder} has no pad token, and Flux's text is padded; name one as pad_token in "
            f"{folder / 'tokenizer_config.json'}"
        )
    tokenizer.enable_truncation(length, direction=opened.truncation_side)
    tokenizer.enable_padding(
        length=length,
        direction=opened.padding_side,
        pad_id=opened.pad_token_id,
        pad_token=opened.pad_token,
    )
    return tokenizer
