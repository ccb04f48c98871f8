"""A graph in fp32 -> int8 as standard QuantizeLinear and DequantizeLinear, for the CPU.

Symmetric both ways (S8S8, zero points 0): per-channel weights, one static range per activation,
calibrated on the model's own prompts over all timesteps. Only products of tokens with weights are
quantized: they are nearly all of the work. In fp32 stay the embeddings, the modulations (a vector
per image: no work, and an error of theirs is in every token), and the last projection.

The quantizer is ONNX Runtime's with plain minimum and maximum. Measured on the trained mini: 8
images of 20 steps against those of the fp32 graph; error of the final latents; milliseconds of CPU
time of a step on one core at batch 1 and 4, where fp32 takes 19 and 66 on OpenVINO, 17 and 65 on
ONNX Runtime, and 43 and 123 in eager torch:

    quantizer                              worst, best image   latents   batch 1, 4   made in
    ONNX Runtime, minimum and maximum       50.3 to 55.0 dB     0.016     9, 29 ms        7 s
      second MLP layers left in fp32        53.3 to 58.1 dB     0.008    14, 51 ms        7 s
      modulations in int8 too               48.8 to 54.8 dB     0.018     9, 33 ms        9 s
    ONNX Runtime, percentile 99.99          47.6 to 57.2 dB     0.025    11, 28 ms       15 s
    NNCF, bias correction                   48.3 to 55.9 dB     0.014    14, 35 ms       14 s
    NNCF, SmoothQuant, bias correction      43.3 to 50.7 dB     0.037    13, 36 ms       20 s

NNCF is not better here, takes longer to make and to run, and wrote nodes at opset 23 that ONNX
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
