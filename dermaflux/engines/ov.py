"""OpenVINO on a CPU, or on Intel's GPU or NPU: which engine opens which part of a bundle.

>>> load(bundle, choose(bundle, "transformer")).run({...})["out_hidden_states"]

A Flux transformer on a CPU is an engine that leaves out of its step what does not change
(`dermaflux.engines.ov_denoiser`), a decoder one that has a model of its usual size
(`dermaflux.engines.ov_decoder`); all else runs as it is (`dermaflux.engines.ov_engine`). An NPU
compiles for one shape, so there a part takes the bundle's default size, one image at a time. What
has run: the CPU. GPU and NPU have not; their settings are tested with a stand-in for OpenVINO.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from dermaflux.bundle import Bundle, Limits
from dermaflux.engines import OPENVINO, OPENVINO_NPU, Choice
from dermaflux.engines.ov_decoder import Decoder, rewrite
from dermaflux.engines.ov_denoiser import Denoiser
from dermaflux.engines.ov_engine import OpenVinoEngine as OpenVinoEngine
from dermaflux.engines.ov_graph import read
from dermaflux.engines.ov_library import core as core
from dermaflux.engines.ov_rewrite import attentions, joined
from dermaflux.engines.ov_settings import told
from dermaflux.engines.ov_shapes import kept_at_once
from dermaflux.engines.ov_split import STEPPING, split
from dermaflux.engines.sizes import shape_of, sizes
from dermaflux.errors import EngineError, translated

LOW: Final = ("int8", "int8-pruned", "bf16")
"""Precisions of a classifier that a CPU may compute in bf16 what is not in 8 bits."""
_TOLERANCE: Final = 0.1
"""Share of the largest output by which bf16 may be off where the bundle does not tell: the export's
bound for bf16 (`export.parity`)."""


def load(
    bundle: Bundle,
    choice: Choice,
    threads: int | None = None,
    outputs: Collection[str] | None = None,
    size: tuple[int, int] | None = None,
) -> OpenVinoEngine | Denoiser | Decoder:
    """The engine of a choice of one of OpenVINO's devices; `outputs` as in `OpenVinoEngine`, `size`
    as in `dermaflux.engines.load`.

    Raises:
        EngineError: see `OpenVinoEngine`.
    """
    part = bundle.parts[choice.part]
    file = part.files[choice.precision]
    if choice.part == "transformer" and choice.engine == OPENVINO:
        made = opened(bundle.file(file.path), choice.precision, threads)
        if isinstance(made, Denoiser):
            made.prepare(_usual(bundle, choice.part, size))
        return made
    if choice.part == "vae_decoder" and choice.engine == OPENVINO:
        # Not of `size`: its model of the usual size rounds otherwise than the one for all others,
        # and a picture must not depend on what it was opened for.
        graph = bundle.file(file.path)
        return Decoder(
            lambda shapes: OpenVinoEngine(
                graph, choice.precision, threads, shapes=shapes, rewrites=rewrite
            ),
            _usual(bundle, choice.part),
        )
    shapes = _usual(bundle, choice.part) if choice.engine == OPENVINO_NPU else None
    bf16 = None
    if choice.part == "classifier" and choice.precision in LOW:
        bf16 = _TOLERANCE if file.parity is None else file.parity.tolerance
    return OpenVinoEngine(
        bundle.file(file.path),
        choice.precision,
        threads,
        name=choice.engine,
        shapes=shapes,
        outputs=outputs,
        bf16=bf16,
        batches=choice.part == "classifier",
    )


def opened(graph: Path, precision: str, threads: int | None = None) -> OpenVinoEngine | Denoiser:
    """A graph on the CPU: a Flux transformer with what does not change from step to step taken out
    of the step (`dermaflux.engines.ov_denoiser`), and any other as it is.

    Raises:
        EngineError: the file is not a graph that this OpenVINO reads.
    """
    with translated(EngineError, f"OpenVINO cannot open {graph}"):
        model = read(core(), graph)
        names = {port.get_any_name() for port in model.inputs}
        found = None
        if set(STEPPING) <= names:
            kinds = {
                port.get_any_name(): port.get_element_type().to_dtype() for port in model.inputs
            }
            attentions(model)
            joined(model)
            found = split(model)
    # Its weights are read once more, or are those of what was found.
    del model
    if found is None:
        # As `load` has it: what is compared is what will run.
        rewrites = rewrite if names == {"latent_sample"} else None
        return OpenVinoEngine(graph, precision, threads, rewrites=rewrites)
    settings = told("CPU", precision, threads)
    return Denoiser(
        graph,
        OPENVINO,
        precision,
        found,
        kinds,
        lambda one: core().compile_model(one, "CPU", settings),
        kept_at_once(_bytes(graph)),
    )


def _usual(
    bundle: Bundle, part: str, size: tuple[int, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's inputs for one picture of a size: the bundle's usual one if none is given,
    or one that will be refused."""
    height, width = bundle.defaults.height, bundle.defaults.width
    if size is not None and all(_drawn(side, bundle.limits) for side in size):
        height, width = size
    free = sizes(bundle.model.scale, 1, height, width)
    return {tensor.name: shape_of(tensor, free) for tensor in bundle.parts[part].inputs}


def _drawn(side: int, limits: Limits) -> bool:
    """Whether pictures of so many pixels a side are drawn."""
    return limits.min_size <= side <= limits.max_size and side % limits.size_multiple == 0


def _bytes(graph: Path) -> int:
    """Of a graph and of the weights beside it."""
    beside = graph.with_name(f"{graph.name}.data")
    return graph.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
