"""PyTorch as it is: the reference that every other engine is compared with.

Opens parts of a checkpoint (not of a bundle) behind the tensor names of a bundle's graphs. The one
module of the runtime that imports torch, so nothing imports it until it was asked for.

    >>> load(Path("models/mini"), "transformer").run({"hidden_states": tokens, ...})
    >>> load(Path("models/mini"), "transformer", compile=True)      # torch.compile
    >>> load(Path("models/mini"), "transformer", precision="fp8", device="cuda")    # torchao
    >>> module(Path("models/mini"), "transformer")                  # the part, ready to be traced
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import nn

from dermaflux import vocabulary
from dermaflux.bundle import GENERATOR_PARTS, TOKENIZERS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import EAGER, Array, Arrays
from dermaflux.errors import BundleError, EngineError
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

PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
"""Files of weights that run whatever code they hold when they are opened."""
_FROM_DISK: Final = {"use_safetensors": True, "local_files_only": True}
"""Without the first, a pickle is opened where there is nothing else; without the second, the
network is asked for what is missing."""


class TextEncoder(nn.Module):
    """CLIP: input_ids [B, T] -> pooler_output [B, P], last_hidden_state [B, T, P]."""

    inputs = ("input_ids",)
    outputs = ("pooler_output", "last_hidden_state")

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from transformers import CLIPTextModel

        super().__init__()
        self.model = _transformers(CLIPTextModel, checkpoint / "text_encoder", dtype, weights)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(input_ids)
        return output.pooler_output, output.last_hidden_state


class TextEncoder2(nn.Module):
    """T5: input_ids [B, T] -> last_hidden_state [B, T, D]."""

    inputs = ("input_ids",)
    outputs = ("last_hidden_state",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        self.model = _transformers(T5EncoderModel, checkpoint / "text_encoder_2", dtype, weights)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model(input_ids).last_hidden_state,)


class Transformer(nn.Module):
    """Flux: tokens [B, N, 4C], text, timestep [B] (0..1), ids, guidance [B] -> velocity."""

    inputs: tuple[str, ...] = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
    )
    outputs = ("out_hidden_states",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from diffusers import FluxTransformer2DModel

        super().__init__()
        self.model = _diffusers(FluxTransformer2DModel, checkpoint / "transformer", dtype, weights)
        if not self.model.config.guidance_embeds:
            self.inputs = self.inputs[:-1]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        (velocity,) = self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )
        return (velocity,)


class VaeDecoder(nn.Module):
    """latent_sample [B, C, h, w] (scaled and shifted) -> sample [B, 3, H, W] (-1..1)."""

    inputs = ("latent_sample",)
    outputs = ("sample",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype, weights)

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (sample,) = self.model.decode(latent_sample, return_dict=False)
        return (sample,)


class VaeEncoder(nn.Module):
    """sample [B, 3, H, W] (-1..1) -> latent_parameters [B, 2C, h, w]: means, log variances."""

    inputs = ("sample",)
    outputs = ("latent_parameters",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype, weights)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode(sample).latent_dist.parameters,)


class Classifier(nn.Module):
    """timm: pixel_values [B, 3, H, W] (normalised) -> logits [B, classes], features [B, F], and
    saliency [B, rows, columns]: how much each patch was looked at, its largest 1.

    A saliency is a vision transformer's attention rolled out over its blocks, heads averaged, the
    residual counted half. Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers
    (2020). It tells where the model looked, not why. A model of another kind has none.
    """

    inputs = ("pixel_values",)
    outputs: tuple[str, ...] = ("logits", "features", "saliency")

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        import timm
        from safetensors.torch import load_file

        super().__init__()
        folder = checkpoint / "classifier"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
        if weights:
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.to(dtype)
        # Not an attribute of tensors: a trace allows a module none that it was not born with.
        mixed: list[torch.Tensor] = []
        self._mixed: Callable[[], list[torch.Tensor]] = lambda: mixed
        self._attentions = [block.attn for block in getattr(self.model, "blocks", ())]
        if not self._attentions or not all(hasattr(attn, "qkv") for attn in self._attentions):
            self.outputs = self.outputs[:-1]
            return
        for attention in self._attentions:
            attention.qkv.register_forward_hook(lambda _, __, output: mixed.append(output))
        rows, columns = self.model.patch_embed.grid_size
        prefix = self.model.num_prefix_tokens
        start = torch.zeros(1, 1, prefix + rows * columns, dtype=dtype)
        if self.model.global_pool == "token":
            start[..., 0] = 1
        else:
            start[..., prefix:] = 1 / (rows * columns)
        self.register_buffer("start", start, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._mixed().clear()
        tokens = self.model.forward_features(pixel_values)
        features = self.model.forward_head(tokens, pre_logits=True)
        logits = self.model.get_classifier()(features)
        if "saliency" not in self.outputs:
            return logits, features
        return logits, features, self._saliency()

    def _saliency(self) -> torch.Tensor:
        """From the last block, whose token is read, back to the patches."""
        looked: torch.Tensor = self.get_buffer("start")
        for attention, mixed in zip(self._attentions[::-1], self._mixed()[::-1], strict=True):
            batch, length, _ = mixed.shape
            heads = mixed.reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key = attention.q_norm(heads[0]), attention.k_norm(heads[1])
            weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1).mean(1)
            looked = 0.5 * (looked + looked @ weights)
        patches = looked[:, 0, self.model.num_prefix_tokens :]
        patches = patches / patches.amax(dim=1, keepdim=True)
        return patches.reshape(-1, *self.model.patch_embed.grid_size)


_PARTS: Final[Mapping[str, type[nn.Module]]] = {
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder2,
    "transformer": Transformer,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
    "classifier": Classifier,
}


def module(
    checkpoint: Path, part: str, dtype: torch.dtype = torch.float32, *, weights: bool = True
) -> nn.Module:
    """A part of a checkpoint as a module: `forward` takes tensors in the order of `.inputs` and
    gives a tuple in the order of `.outputs`. In evaluation mode, without gradients.

    Without `weights` the files of weights are not opened, and parameters hold anything: on the
    device "meta" such a part takes no memory, and can still be traced.

    Raises:
        EngineError: the part's weights are not there or do not fit its config.
    """
    try:
        return _PARTS[part](checkpoint, dtype, weights).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        refused = pickled(checkpoint / ("vae" if part.startswith("vae_") else part))
        raise EngineError(f"{part} of {checkpoint} cannot be opened: {error}{refused}") from error


def pickled(folder: Path) -> str:
    """For an error on weights that are not there: that they are, as a pickle. Or nothing."""
    names = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not names:
        return ""
    return (
        f" (a pickle, {names[0]}, is there and is refused: opening it runs its code; "
        "save the weights as safetensors)"
    )


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

    def bind(self, constant: Arrays) -> Callable[[Arrays], dict[str, Array]]:
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


def load(
    checkpoint: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    *,
    precision: str | None = None,
    device: str = "cpu",
    compile: bool = False,
    threads: int | None = None,
) -> EagerEngine:
    """The engine of a part; `compile` puts torch.compile around it, which pays after minutes.

    `precision` names a dtype (`fp32`, `bf16`, `fp16`), or is `fp8`: torchao's, for the blocks of
    the transformer; other parts are in bf16 then. `threads` is torch's number for the whole
    process: torch has no other.

    Raises:
        EngineError: the part cannot be opened, torch has no such device, or no such precision.
    """
    if precision is not None and precision not in (*PRECISIONS.values(), FP8):
        known = ", ".join((*PRECISIONS.values(), FP8))
        raise EngineError(f"the eager engine has no precision {precision!r}; use {known}")
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if precision is not None:
        named = {name: kind for kind, name in PRECISIONS.items()}
        dtype = named.get(precision, torch.bfloat16)
    name = PRECISIONS[dtype]
    with _LOADING:
        part_module: Any = module(checkpoint, part, dtype).to(place)
    if precision == FP8 and part == "transformer":
        _to_fp8(part_module, place)
        name = FP8
    return EagerEngine(
        model=torch.compile(part_module) if compile else part_module,
        inputs=part_module.inputs,
        outputs=part_module.outputs,
        precision=name,
        dtype=dtype,
        device=place,
        lock=threading.Lock(),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # A torch built without CUDA asserts; others raise RuntimeError.
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise EngineError(f"torch cannot use the device {name!r}: {why}. Use cpu") from error
    return device


def _to_fp8(part: nn.Module, device: torch.device) -> None:
    """The linear layers of all blocks in fp8, in place; embedders, norms and the last layer stay.

    On CUDA weights and activations, scaled by row, and weights alone where a layer sees one row
    per image (modulation); on a CPU weights alone, for there are no products of fp8. Run so far:
    the CPU.
    """
    if importlib.util.find_spec("torchao") is None:
        raise EngineError("fp8 on the eager engine needs torchao; pip install torchao")
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    def in_block(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and "transformer_blocks." in name

    def modulates(layer: nn.Module, name: str) -> bool:
        return in_block(layer, name) and ".norm" in name

    everything = Float8WeightOnlyConfig()
    try:
        if device.type == "cpu":
            quantize_(part, everything, filter_fn=in_block)
            return
        products = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        quantize_(part, everything, filter_fn=modulates)
        quantize_(part, products, filter_fn=lambda m, n: in_block(m, n) and not modulates(m, n))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise EngineError(f"torchao has no fp8 on {device}: {error}") from error


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
    try:
        opened: Any = kind.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(opened.backend_tokenizer.to_str())
    except Exception as error:  # A dozen kinds, by format and converter.
        raise BundleError(f"{folder} is not a tokenizer that can be converted: {error}") from error
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


def _vae(checkpoint: Path, dtype: torch.dtype, weights: bool) -> Any:
    from diffusers import AutoencoderKL

    return _diffusers(AutoencoderKL, checkpoint / "vae", dtype, weights)


def _diffusers(kind: Any, folder: Path, dtype: torch.dtype, weights: bool) -> Any:
    if weights:
        return kind.from_pretrained(folder, dtype=dtype, **_FROM_DISK)
    with _default(dtype):
        return kind.from_config(kind.load_config(folder))


def _transformers(kind: Any, folder: Path, dtype: torch.dtype, weights: bool) -> Any:
    if weights:
        return kind.from_pretrained(folder, dtype=dtype, **_FROM_DISK)
    with _default(dtype):
        return kind(kind.config_class.from_pretrained(folder))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors that are made without a type have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
