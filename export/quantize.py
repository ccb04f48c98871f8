"""A graph in fp32 -> int8 as standard QuantizeLinear and DequantizeLinear, for the CPU.

Symmetric both ways (S8S8, zero points 0): per-channel weights, one static range per activation,
calibrated on the model's own prompts over all timesteps. Only products of tokens with weights are
quantized: they are nearly all of the work. In fp32 stay the embeddings, the modulations (a vector
per image: no work, and an error of theirs is in every token), and the last projection.

The quantizer is ONNX Runtime's with plain minimum and maximum. Measured on a half-trained mini
(20 steps, latents against those of fp32; milliseconds of a step on one core at batch 1 and 4, where
fp32 takes 23 and 67 on OpenVINO, 18 and 66 on ONNX Runtime, and eager torch 43 and 123):

    what                                   worst and best image   error of latents      ms   made in
    ONNX Runtime, minimum and maximum      52.6 to 55.2 dB                   0.015   12, 30      5 s
    ONNX Runtime, percentile 99.99         53.7 to 55.2 dB                   0.022   12, 39     11 s
    the same, second MLP layers in fp32    52.7 to 56.3 dB                   0.011   17, 53      5 s
    the same, modulations in int8 too      46.3 to 51.7 dB                   0.067   11, 29      6 s
    NNCF, bias correction                  55.4 to 56.6 dB                   0.013   14, 39     12 s
    NNCF, SmoothQuant and correction       52.5 to 56.2 dB                   0.033   13, 31     17 s

NNCF is not better by more than prompts differ, takes longer, and wrote nodes at opset 23 that ONNX
Runtime refuses wherever it chose an unsigned range.

    >>> samples = calibrate(checkpoint, folder, requests(checkpoint, count=8, seed=1))
    >>> quantize(Path("model.onnx"), Path("model_int8.onnx"), samples["transformer"])
    44
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import Arrays
from dermaflux.pipeline import Request
from export import verify
from export.reference import as_inputs

PARTS: Final = ("transformer", "classifier")
"""Parts that int8 is worth it for: the others run once an image, or not at all."""

_OPERATOR: Final = "MatMul"
"""A linear layer over tokens; one over a single vector per image is traced to Gemm."""
_SKIPPED: Final = ("x_embedder", "context_embedder", "proj_out")
"""First and last layers of the transformer: small, and nothing evens out their errors."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime's way to ask for samples."""

    def __init__(self, samples: Sequence[Arrays]) -> None:
        self._samples: Iterator[Arrays] = iter(samples)

    def get_next(self) -> Any:
        return next(self._samples, None)


def calibrate(
    checkpoint: Checkpoint, folder: Path, requests: Sequence[Request]
) -> dict[str, list[Arrays]]:
    """What the quantized parts see while the fp32 graphs in `folder` make images of requests."""
    engine = verify.engines("fp32")[0]
    pipeline, recorder = verify.pipeline(checkpoint, folder, engine, "fp32")
    images = pipeline.generate(requests)
    samples = {"transformer": [case.inputs for case in recorder.cases]}
    if checkpoint.classifier is not None:
        samples["classifier"] = [as_inputs(checkpoint, "classifier", images)]
    return samples


def quantize(graph: Path, target: Path, samples: Sequence[Arrays]) -> int:
    """Write the int8 twin of a graph; returns how many products it quantized.

    Weights that are beside the graph are beside the twin, in `<target>.data`.
    """
    root = logging.getLogger()
    level = root.level
    # It advises on its own pre-processing, which the exporter's optimizer has done.
    root.setLevel(logging.ERROR)
    try:
        quantize_static(
            str(graph),
            str(target),
            _Reader(samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[_OPERATOR],
            nodes_to_exclude=list(_SKIPPED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=graph.with_name(f"{graph.name}.data").exists(),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                # A sum goes on in fp32: quantizing it would cost accuracy and save nothing.
                "OpTypesToExcludeOutputQuantization": [_OPERATOR],
            },
        )
    finally:
        root.setLevel(level)
    nodes = onnx.load(str(target), load_external_data=False).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return sum(node.op_type == _OPERATOR and node.input[1] in dequantized for node in nodes)
