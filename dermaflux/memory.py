"""Memory, planned before anything is loaded: what parts need, what devices have, who stays in turn.

    >>> plan(bundle, choices, look()).groups         # one group: all parts stay together
    (('text_encoder', 'text_encoder_2', 'transformer', 'vae_decoder'),)

Bytes of a part = weights * copies + images * activations, and 0.1 GB (CPU) or 0.8 GB (GPU) for each
device's libraries. Weights are the sizes of the files, `bundle.json` has them. `copies` were
measured on CPUs with the embedded default (resident memory after loading): ONNX Runtime keeps 1.3
times the weights, OpenVINO 2.4 times, its own layout beside the file's. A small transformer that
OpenVINO compiles for each shape is counted for one: whoever asks for many sizes and batches has
more of them, up to some 0.5 GB (`dermaflux.engines.ov_shapes`). GPUs keep one copy; that, and the
libraries' share there, are assumptions that no GPU has confirmed yet.

Activations of one image, in numbers, at their peak (measured: 0.8 to 1.1 of this on CPUs):

* transformer, S text and image tokens of width D, H heads: 16 S D + 3 H S^2
* decoder to X x Y pixels, C channels at full size, T latent cells: max(5 X Y C, 1.2 T^2)
* text encoders, T tokens, widths D and F, H heads: 4 T (D + F) + 3 H T^2
* others: 32 times their inputs and outputs

4 bytes each on a CPU and in fp32, else 2; without the squares where attention is fused (TensorRT,
torch). An image's cost limits the batch: batches are split where they would not fit, and since
an image depends on its own request alone, nobody sees that in an image.

Where all parts together do not fit they take turns (`groups`): text encoders, then the transformer,
then the decoder, each freed before the next. What cannot fit at all is refused with these figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dermaflux.bundle import GENERATOR_PARTS, Bundle, Tensor
from dermaflux.engines import (
    EAGER,
    OPENVINO_NPU,
    ORT,
    ORT_CUDA,
    ORT_TENSORRT,
    TENSORRT,
    Choice,
    choose,
)
from dermaflux.engines.sizes import sizes
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine, Memory

CPU: Final = "the CPU"
GPU: Final = "the GPU"
_ON_GPU: Final = (TENSORRT, ORT_TENSORRT, ORT_CUDA)
_FUSED: Final = (TENSORRT, ORT_TENSORRT, EAGER)
_LIBRARIES: Final[Mapping[str, int]] = {CPU: 100_000_000, GPU: 800_000_000}

_TURNS: Final = (
    (GENERATOR_PARTS,),
    (("text_encoder", "text_encoder_2"), ("transformer", "vae_decoder")),
    (("text_encoder", "text_encoder_2"), ("transformer",), ("vae_decoder",)),
    tuple((part,) for part in GENERATOR_PARTS),
)
"""Who is in memory together, from the fastest to the smallest."""


@dataclass(frozen=True)
class Need:
    """What one part needs on `device`: bytes of weights, and by size what an image adds."""

    part: str
    engine: str
    precision: str
    device: str
    weights: int
    number: int
    """Bytes of one number of an activation."""
    fused: bool
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    def image(self, height: int, width: int, scale: int) -> int:
        """Bytes that one image of a size in pixels adds; `scale` is of a latent cell."""
        h, w = height // scale, width // scale
        linear, square = _numbers(self.part, self.config, self.tensors, h, w, scale)
        kept = linear if self.fused else _together(self.part, linear, square)
        return kept * self.number


@dataclass(frozen=True)
class Plan:
    """Parts that fit. `groups` are in memory by turns; `devices` are what was free to plan with."""

    needs: tuple[Need, ...]
    groups: tuple[tuple[str, ...], ...]
    devices: Mapping[str, Memory]
    scale: int
    max_batch: int

    @property
    def in_turns(self) -> bool:
        """Whether parts are freed for others; then every call loads them anew."""
        return len(self.groups) > 1

    def peak(self, device: str, height: int, width: int, batch: int = 1) -> int:
        """The most bytes in use on a device at once."""
        most = 0
        for group in self.groups:
            here = [n for n in self.needs if n.part in group and n.device == device]
            if here:
                images = max(need.image(height, width, self.scale) for need in here)
                most = max(most, sum(need.weights for need in here) + batch * images)
        return most + _LIBRARIES[device] if most else 0

    def batch(self, height: int, width: int) -> int:
        """How many images of a size go through together: 1 to the bundle's `max_batch`.

        Raises:
            EngineError: not even one fits.
        """
        for batch in range(self.max_batch, 0, -1):
            if all(self.peak(d, height, width, batch) <= m.available for d, m in self._known()):
                return batch
        raise EngineError(
            f"an image of {width} x {height} pixels does not fit: {self.shortage(height, width)}. "
            f"Ask for a smaller one{'' if self.in_turns else ', or for parts in turns'}"
        )

    def shortage(self, height: int, width: int) -> str:
        """For people: what is needed for one image and what is there, per device."""
        words = []
        for device, memory in self._known():
            parts = ", ".join(
                f"{n.part} {n.precision} {gigabytes(n.weights)} + "
                f"{gigabytes(n.image(height, width, self.scale))}"
                for n in self.needs
                if n.device == device
            )
            if parts:
                words.append(
                    f"{device} needs {gigabytes(self.peak(device, height, width))} at once "
                    f"({parts}) and has {gigabytes(memory.available)} free of "
                    f"{gigabytes(memory.total)}"
                )
        return "; ".join(words)

    def _known(self) -> Iterator[tuple[str, Memory]]:
        yield from self.devices.items()


def plan(
    bundle: Bundle,
    choices: Mapping[str, Choice],
    machine: Machine,
    *,
    height: int | None = None,
    width: int | None = None,
    in_turns: bool | None = None,
) -> Plan:
    """Who is in memory when, so that one image of a size (the bundle's default) fits.

    `in_turns` forces that parts stay together (False) or take turns (True); then nothing is
    refused, for figures are estimates. A device whose memory is not known is not planned.

    Raises:
        EngineError: it does not fit; with the figures, and the options that would.
    """
    height, width = height or bundle.defaults.height, width or bundle.defaults.width
    made = _plans(bundle, choices, machine)
    if in_turns is not None:
        return made[-1] if in_turns else made[0]
    for candidate in made:
        if _fits(candidate, height, width):
            return candidate
    options = _alternatives(bundle, choices, machine, height, width)
    raise EngineError(
        f"the bundle {bundle.name} does not fit here, its parts in turns: "
        f"{made[-1].shortage(height, width)}. "
        + (
            f"What fits: {'; or '.join(options)}"
            if options
            else "No precision or size of this bundle fits; use a machine with more memory, or "
            "free what other programs hold"
        )
    )


def devices(machine: Machine) -> dict[str, Memory]:
    """The memory of the devices that parts run on, as far as it is known."""
    found = {} if machine.ram is None else {CPU: machine.ram}
    return found | ({GPU: machine.gpus[0].memory} if machine.gpus else {})


def need(bundle: Bundle, choice: Choice) -> Need:
    """What a part needs. Eager torch is taken for the size of the bundle's file."""
    part = bundle.parts[choice.part]
    file = part.files.get(choice.precision) or next(iter(part.files.values()))
    size = file.bytes + sum(data.bytes for data in file.data)
    on_gpu = choice.engine in _ON_GPU or choice.device.startswith("cuda")
    return Need(
        part=choice.part,
        engine=choice.engine,
        precision=choice.precision,
        device=GPU if on_gpu else CPU,
        weights=round(size * _copies(choice)),
        number=2 if on_gpu and choice.precision != "fp32" else 4,
        fused=choice.engine in _FUSED,
        config=_config(bundle, choice.part),
        tensors=(*part.inputs, *part.outputs),
    )


def gigabytes(count: int) -> str:
    """Bytes for people: decimal, as files and NVML's GB are counted."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _plans(bundle: Bundle, choices: Mapping[str, Choice], machine: Machine) -> list[Plan]:
    needs = tuple(need(bundle, choices[part]) for part in GENERATOR_PARTS)
    # An NPU compiles for one shape: batch 1.
    fixed = any(choice.engine == OPENVINO_NPU for choice in choices.values())
    most = 1 if fixed else bundle.limits.max_batch
    first = Plan(needs, _TURNS[0], devices(machine), bundle.model.scale, most)
    return [replace(first, groups=groups) for groups in _TURNS]


def _fits(candidate: Plan, height: int, width: int) -> bool:
    return all(
        candidate.peak(device, height, width) <= memory.available
        for device, memory in candidate.devices.items()
    )


def _alternatives(
    bundle: Bundle, choices: Mapping[str, Choice], machine: Machine, height: int, width: int
) -> list[str]:
    """Options of the command line that would fit, each with what it needs."""
    found = []
    small = bundle.limits.min_size
    if (height, width) != (small, small):
        for candidate in _plans(bundle, choices, machine):
            if _fits(candidate, small, small):
                found.append(f"--height {small} --width {small}")
                break
    for precision in sorted({level for part in bundle.parts.values() for level in part.files}):
        try:
            others = {p: choose(bundle, p, None, precision, machine) for p in GENERATOR_PARTS}
        except EngineError:
            continue
        if all(others[part].precision == choices[part].precision for part in others):
            continue
        last = _plans(bundle, others, machine)[-1]
        if _fits(last, height, width):
            peaks = ", ".join(
                f"{gigabytes(last.peak(device, height, width))} of {device}"
                for device in last.devices
                if last.peak(device, height, width)
            )
            found.append(f"--precision {precision} ({peaks})")
    return found


def _copies(choice: Choice) -> float:
    """How often an engine keeps the bytes of a file; measured on CPUs, see above."""
    if choice.engine in _ON_GPU or choice.engine == EAGER:
        return 1.0
    # Without instructions for them a CPU widens 16-bit and fp8 weights to fp32.
    widened = {"fp16": 2.0, "bf16": 2.0, "fp8": 4.0}.get(choice.precision, 1.0)
    return widened * (1.3 if choice.engine == ORT else 2.4)


def _config(bundle: Bundle, part: str) -> Mapping[str, Any]:
    """The part's `config.json`, as its library wrote it; nothing where there is none."""
    try:
        content = json.loads(bundle.file(f"{part}/config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _numbers(
    part: str,
    config: Mapping[str, Any],
    tensors: Sequence[Tensor],
    h: int,
    w: int,
    scale: int,
) -> tuple[int, int]:
    """Numbers of an image's activations at their peak: those of layers, and of attention."""
    length = _length(tensors, "input_ids") or _length(tensors, "encoder_hidden_states")
    try:
        match part:
            case "transformer":
                tokens, heads = length + h * w // 4, config["num_attention_heads"]
                wide = heads * config["attention_head_dim"]
                return 16 * tokens * wide, 3 * heads * tokens**2
            case "vae_decoder":
                channels = config["block_out_channels"]
                full = 5 * h * w * scale**2 * channels[min(1, len(channels) - 1)]
                return full, 6 * (h * w) ** 2 // 5
            case "text_encoder":
                heads = config["num_attention_heads"]
                wide = config["hidden_size"] + config["intermediate_size"]
                return 4 * length * wide, 3 * heads * length**2
            case "text_encoder_2":
                wide = config["d_model"] + config["d_ff"]
                return 4 * length * wide, 3 * config["num_heads"] * length**2
    except (KeyError, TypeError):
        pass
    free = sizes(scale, 1, h * scale, w * scale)
    counts = (
        math.prod(axis if isinstance(axis, int) else free.get(axis, 1) for axis in tensor.shape)
        for tensor in tensors
    )
    return 32 * sum(counts), 0


def _together(part: str, linear: int, square: int) -> int:
    """A decoder's attention is in its smallest layer, so both peaks are not at once."""
    return max(linear, square) if part == "vae_decoder" else linear + square


def _length(tensors: Sequence[Tensor], name: str) -> int:
    for tensor in tensors:
        if tensor.name == name and isinstance(tensor.shape[1], int):
            return tensor.shape[1]
    return 0
