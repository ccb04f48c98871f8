"""A complete bundle of hand-made graphs, written in milliseconds, without torch or an export.

The graphs are a few standard operators each. They keep what tests look at: tensor names, free
dimensions, that an item's output depends on that item alone, and that prompt, seed, guidance and
size all change the image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dermaflux.bundle import sha256

CLIP_LENGTH, TEXT_LENGTH, CHANNELS, SCALE, WIDTH = 12, 16, 4, 8, 8
WORDS = ("[PAD]", "[UNK]", "benign", "malignant", "lesion", "nevus", "melanoma", ",", "black")


def write_tokenizer(path: Path, length: int) -> None:
    """Words -> numbers, padded and cut to `length`."""
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_bundle(folder: Path) -> Path:
    """The whole bundle; `bundle.json` last. The int8 files are the fp32 ones by another name."""
    random = np.random.default_rng(0)
    write_tokenizer(folder / "tokenizer/tokenizer.json", CLIP_LENGTH)
    write_tokenizer(folder / "tokenizer_2/tokenizer.json", TEXT_LENGTH)
    Image.new("RGB", (64, 64)).save(folder / "golden.png")
    graphs = {
        "text_encoder": _text(random, CLIP_LENGTH),
        "text_encoder_2": _text(random, TEXT_LENGTH),
        "transformer": _transformer(random),
        "vae_decoder": _decoder(random),
        "classifier": _classifier(random),
    }
    parts: dict[str, Any] = {}
    for name, model in graphs.items():
        (folder / name).mkdir()
        files = {}
        for precision in ("fp32", "int8") if name in ("transformer", "classifier") else ("fp32",):
            path = f"{name}/model.onnx" if precision == "fp32" else f"{name}/model_int8.onnx"
            onnx.save(model, folder / path)
            files[precision] = {
                "path": path,
                "bytes": (folder / path).stat().st_size,
                "sha256": sha256(folder / path),
                "data": [],
                "engines": ["onnxruntime-cpu", "openvino-cpu"],
                "compared": ["onnxruntime-cpu"],
                "emulated": [],
                "quantized_ops": {},
                "parity": {"max_abs": 0.0, "relative": 0.0, "tolerance": 0.001},
            }
        parts[name] = {
            "inputs": [_tensor(value) for value in model.graph.input],
            "outputs": [_tensor(value) for value in model.graph.output],
            "files": files,
        }
    others = ("golden.png", "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json")
    listed = [_data(folder, name) for name in others]
    content = {**manifest(parts), "files": listed}
    (folder / "bundle.json").write_text(json.dumps(content, indent=2))
    return folder


def manifest(parts: dict[str, Any]) -> dict[str, Any]:
    """The content of `bundle.json`, without `files`."""
    images = {
        "prompts": 2, "steps": 4, "psnr_median_db": 50.0, "psnr_worst_db": 40.0,
        "ssim_median": 0.99, "ssim_worst": 0.98, "tolerance_db": 42.0, "tolerance_worst_db": 36.0,
    }  # fmt: skip
    return {
        "schema": 2,
        "name": "tiny",
        "created": "2026-01-01T00:00:00+00:00",
        "made_by": "dermaflux 0.1.0",
        "parts": parts,
        "model": {
            "latent_channels": CHANNELS,
            "scale": SCALE,
            "scaling_factor": 0.5,
            "shift_factor": 0.1,
            "text_length": TEXT_LENGTH,
            "clip_length": CLIP_LENGTH,
            "guidance_embeds": True,
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "defaults": {"steps": 4, "guidance": 3.5, "height": 64, "width": 64},
        "limits": {
            "min_size": 32, "max_size": 128, "size_multiple": 16, "max_steps": 20, "max_batch": 8
        },
        "wording": "dermaflux-1",
        "classifier": {
            "classes": ["benign", "malignant"],
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.6, 0.7],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "temperature": 1.5,
            "threshold": 0.4,
            "abstain": [0.3, 0.5],
        },
        "parity": {
            "images": {"fp32": {"onnxruntime-cpu": images}},
            "classifier": {
                "fp32": {
                    "max_probability_change": 0.0, "images": 2, "auc": None, "auc_eager": None
                }
            },
        },
        "golden": {"request": {"seed": 1}, "image": "golden.png", "tolerance_db": 30},
        "provenance": {"name": "tiny", "ingredients": []},
        "licences": [{"name": "tiny", "licence": "Apache-2.0", "attribution": "nobody"}],
    }  # fmt: skip


def _data(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    dtype = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}[kind.elem_type]
    shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    return {"name": value.name, "dtype": dtype, "shape": shape}


def _model(
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray[Any, Any]],
) -> onnx.ModelProto:
    def info(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name == "input_ids" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **rest) for kind, ins, outs, rest in nodes],
        "tiny",
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def _floats(random: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return random.standard_normal(shape).astype(np.float32)


def _text(random: np.random.Generator, length: int) -> onnx.ModelProto:
    return _model(
        [
            ("Gather", ["table", "input_ids"], ["last_hidden_state"], {}),
            ("ReduceMax", ["last_hidden_state"], ["pooler_output"], {"axes": [1], "keepdims": 0}),
        ],
        {"input_ids": ["batch", length]},
        {"last_hidden_state": ["batch", length, WIDTH], "pooler_output": ["batch", WIDTH]},
        {"table": _floats(random, len(WORDS), WIDTH)},
    )


def _transformer(random: np.random.Generator) -> onnx.ModelProto:
    tokens = 4 * CHANNELS
    return _model(
        [
            # Not the mean: ONNX Runtime sums over a middle axis in another order where the batch is
            # 1, and then batches are not bit-equal.
            ("ReduceMax", ["encoder_hidden_states"], ["words"], {"axes": [1], "keepdims": 0}),
            ("Add", ["words", "pooled_projections"], ["text"], {}),
            ("MatMul", ["text", "from_text"], ["pull"], {}),
            ("Unsqueeze", ["guidance", "axis"], ["strength"], {}),
            ("Mul", ["pull", "strength"], ["steered"], {}),
            ("Unsqueeze", ["steered", "axis"], ["row"], {}),
            ("MatMul", ["img_ids", "from_ids"], ["places"], {}),
            ("ReduceSum", ["txt_ids"], ["zero"], {"keepdims": 0}),
            ("Add", ["row", "places"], ["target"], {}),
            ("Add", ["target", "zero"], ["there"], {}),
            ("Sin", ["there"], ["image"], {}),
            ("MatMul", ["hidden_states", "mix"], ["mixed"], {}),
            ("Sub", ["mixed", "image"], ["away"], {}),
            ("Unsqueeze", ["timestep", "axes"], ["time"], {}),
            ("Add", ["time", "one"], ["speed"], {}),
            ("Mul", ["away", "speed"], ["out_hidden_states"], {}),
        ],
        {
            "hidden_states": ["batch", "image_tokens", tokens],
            "encoder_hidden_states": ["batch", TEXT_LENGTH, WIDTH],
            "pooled_projections": ["batch", WIDTH],
            "timestep": ["batch"],
            "img_ids": ["image_tokens", 3],
            "txt_ids": [TEXT_LENGTH, 3],
            "guidance": ["batch"],
        },
        {"out_hidden_states": ["batch", "image_tokens", tokens]},
        {
            "from_text": _floats(random, WIDTH, tokens),
            "from_ids": _floats(random, 3, tokens),
            "mix": np.eye(tokens, dtype=np.float32) + 0.1 * _floats(random, tokens, tokens),
            "axis": np.array([1]),
            "axes": np.array([1, 2]),
            "one": np.array(0.5, dtype=np.float32),
        },
    )


def _decoder(random: np.random.Generator) -> onnx.ModelProto:
    return _model(
        [
            ("Conv", ["latent_sample", "colours"], ["small"], {"kernel_shape": [1, 1]}),
            ("Tanh", ["small"], ["shades"], {}),
            ("Resize", ["shades", "", "scales"], ["sample"], {"mode": "nearest"}),
        ],
        {"latent_sample": ["batch", CHANNELS, "latent_height", "latent_width"]},
        {"sample": ["batch", 3, "height", "width"]},
        {
            "colours": _floats(random, 3, CHANNELS, 1, 1),
            "scales": np.array([1, 1, SCALE, SCALE], dtype=np.float32),
        },
    )


def _classifier(random: np.random.Generator) -> onnx.ModelProto:
    return _model(
        [
            ("ReduceMean", ["pixel_values"], ["features"], {"axes": [2, 3], "keepdims": 0}),
            ("MatMul", ["features", "head"], ["logits"], {}),
        ],
        {"pixel_values": ["batch", 3, 32, 32]},
        {"logits": ["batch", 2], "features": ["batch", 3]},
        {"head": _floats(random, 3, 2)},
    )
