"""The exported bundle is the checkpoint: at other sizes and batches, on every engine it allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from dermaflux.bundle import PARTS, Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import Classifier
from dermaflux.engines import OPENVINO, ORT, choose, eager, load, parts
from dermaflux.pipeline import Pipeline, Request
from export.parity import ParityError, psnr
from export.recipes import MAY_RUN, RECIPES
from export.shapes import Size, examples
from export.verify import standard

# None of these is a size that the export itself looks at.
SIZES = [Size(5, 32, 16), Size(1, 16, 64), Size(4, 40, 24)]


@pytest.mark.parametrize("engine", [ORT, OPENVINO])
@pytest.mark.parametrize("part", PARTS)
def test_exported_equals_eager_at_other_sizes(exported, tiny_checkpoint, part, engine):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    reference = eager.load(tiny_checkpoint, part)
    graph = load(exported, choose(exported, part, engine, "fp32"))
    for seed, size in enumerate(SIZES):
        inputs = examples(checkpoint, part, size, seed=seed + 100)
        outputs = graph.run(inputs)
        wanted = reference.run(inputs)
        assert outputs.keys() == wanted.keys()
        for name, expected in wanted.items():
            assert outputs[name].shape == expected.shape
            np.testing.assert_allclose(outputs[name], expected, atol=2e-5 * abs(expected).max())


@pytest.mark.parametrize(("precision", "engine"), [("int8", OPENVINO), ("fp8", ORT)])
def test_8_bits_are_near_and_not_equal(exported, tiny_checkpoint, precision, engine):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for part in RECIPES[precision]:
        inputs = examples(checkpoint, part, SIZES[0])
        fp32, rounded = (
            load(exported, choose(exported, part, engine, level)).run(inputs)
            for level in ("fp32", precision)
        )
        for name, expected in fp32.items():
            error = np.linalg.norm(rounded[name] - expected) / np.linalg.norm(expected)
            assert 1e-5 < error < 0.1, (part, name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_16_bits_inside_and_float32_outside(schnell, precision):
    kinds = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
    for name, part in schnell.parts.items():
        file = part.files[precision]
        model = onnx.load(schnell.file(file.path))
        weights = [w for w in model.graph.initializer if len(w.dims) > 1]
        low = sum(w.data_type == kinds[precision] for w in weights)
        assert low > len(weights) / 2, name
        # T5 in fp16 keeps a third of its weights in fp32.
        assert file.bytes < 0.85 * part.files["fp32"].bytes
        assert 1e-7 < file.parity.relative < file.parity.tolerance
    assert (ORT in schnell.parts["transformer"].files[precision].engines) == (precision == "fp16")


def test_a_saliency_is_of_its_own_picture(exported, tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    graph = load(exported, choose(exported, "classifier", ORT, "fp32"))
    inputs = examples(checkpoint, "classifier", SIZES[0])["pixel_values"]
    found = graph.run({"pixel_values": inputs})["saliency"]
    assert found.shape == (5, 4, 4)
    assert (found > 0).all()
    np.testing.assert_allclose(found.max(axis=(1, 2)), 1)
    alone = graph.run({"pixel_values": inputs[2:3]})["saliency"]
    np.testing.assert_allclose(alone[0], found[2], atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-4)


def test_it_opens_and_says_what_it_is(exported, tiny_checkpoint):
    opened = Bundle.open(exported.path, verify=True)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert tuple(opened.parts) == PARTS
    assert opened.model == checkpoint.model
    assert opened.defaults == checkpoint.defaults
    assert opened.classifier == checkpoint.classifier
    assert opened.scheduler == checkpoint.scheduler
    assert opened.licences[0].licence == "Apache-2.0"
    assert opened.provenance["export"]["prompts"] == 4
    assert str(tiny_checkpoint.parent) not in (exported.path / "bundle.json").read_text()


def test_which_engine_may_run_which_file(exported):
    for name, part in exported.parts.items():
        assert part.files["fp32"].compared == (ORT, OPENVINO)
        assert set(part.files["fp32"].engines) == set(MAY_RUN["fp32"])
        for precision in ("int8", "fp8"):
            assert (precision in part.files) == (name in RECIPES[precision])
    files = exported.parts["transformer"].files
    assert files["int8"].compared == (OPENVINO,)
    assert ORT not in files["int8"].engines
    assert files["fp8"].compared == files["fp8"].emulated == (ORT,)


def test_parity_is_measured_for_all_that_may_run(exported):
    assert {p: set(e) for p, e in exported.parity.images.items()} == {
        "fp32": {ORT, OPENVINO},
        "int8": {OPENVINO},
        "fp8": {ORT},
    }
    assert set(exported.parity.classifier) == {"fp32", "int8", "fp8"}
    assert exported.parity.classifier["fp8"].images == 4
    assert exported.parity.classifier["fp8"].auc is None
    for by_engine in exported.parity.images.values():
        for found in by_engine.values():
            assert found.prompts == 4
            assert found.psnr_worst_db <= found.psnr_median_db
            assert found.ssim_worst <= found.ssim_median <= 1
    for part in exported.parts.values():
        for file in part.files.values():
            assert 0 < file.parity.relative <= file.parity.tolerance


def test_manifest_and_graphs_name_the_same_tensors(exported):
    for part in exported.parts.values():
        for file in part.files.values():
            graph = onnx.load(exported.file(file.path)).graph
            for told, found in ((part.inputs, graph.input), (part.outputs, graph.output)):
                assert [tensor.name for tensor in told] == [value.name for value in found]
                shapes = [value.type.tensor_type.shape.dim for value in found]
                assert [tensor.shape for tensor in told] == [
                    tuple(axis.dim_param or axis.dim_value for axis in shape) for shape in shapes
                ]


def test_graphs_are_standard_and_say_nothing_of_this_machine(exported, schnell):
    for bundle in (exported, schnell):
        for path in bundle.path.rglob("*.onnx"):
            model = onnx.load(path)
            onnx.checker.check_model(model, full_check=True)
            standard(path)
            assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
            assert {node.domain for node in model.graph.node} == {""}
            assert not model.functions
            inferred = onnx.shape_inference.infer_shapes(model).graph
            kinds = {weight.data_type for weight in model.graph.initializer}
            kinds |= {value.type.tensor_type.elem_type for value in inferred.value_info}
            assert TensorProto.DOUBLE not in kinds
            borders = (*model.graph.input, *model.graph.output)
            assert {value.type.tensor_type.elem_type for value in borders} <= {
                TensorProto.FLOAT,
                TensorProto.INT64,
            }
            assert b"site-packages" not in path.read_bytes()


JUNK = {
    "CastLike": ("CastLike", ["out_hidden_states", "timestep"]),
    "SequenceAt": ("SequenceAt", ["out_hidden_states", "timestep"]),
    "behind a Transpose": ("Transpose", ["proj_out.weight"]),
}


@pytest.mark.parametrize("junk", JUNK)
def test_what_the_exporter_leaves_is_refused(exported, tmp_path, junk):
    model = onnx.load(exported.file(exported.parts["transformer"].files["fp32"].path))
    kind, inputs = JUNK[junk]
    model.graph.node.append(onnx.helper.make_node(kind, inputs, ["extra"]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=junk):
        standard(tmp_path / "model.onnx")


def test_a_nameless_output_and_doubles_are_refused(exported, tmp_path):
    model = onnx.load(exported.file(exported.parts["vae_decoder"].files["fp32"].path))
    model.graph.output[0].name = "linear_503"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "table"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"double precision inside, a tensor named linear_503"):
        standard(tmp_path / "model.onnx")


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_stored_once(exported, tiny_checkpoint, part):
    file = exported.parts[part].files["fp32"]
    model = onnx.load(exported.file(file.path))
    large = [numpy_helper.to_array(w) for w in model.graph.initializer]
    # Constants of a few numbers may repeat; a weight of a layer may not.
    contents = [weight.tobytes() for weight in large if weight.size > 64]
    assert len(contents) == len(set(contents))
    weights = parts.module(tiny_checkpoint, part).state_dict().values()
    most = sum({w.data_ptr(): w.numel() * 4 for w in weights}.values())
    assert sum(weight.nbytes for weight in large) <= most + 4096


def test_weights_keep_their_names(exported, tiny_checkpoint):
    model = onnx.load(exported.file(exported.parts["transformer"].files["fp32"].path))
    found = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    state = parts.module(tiny_checkpoint, "transformer").model.state_dict()
    # A MatMul wants [in, out], a linear layer keeps [out, in].
    for name in (
        "transformer_blocks.0.attn.to_v.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
    ):
        assert np.array_equal(found[name].T, state[name])
    # Of a head's queries and keys the even channels come first (`export.rotary`).
    name = "transformer_blocks.0.attn.to_k.weight"
    size = state["transformer_blocks.0.attn.norm_k.weight"].numel()
    heads = state[name].numpy().reshape(-1, size, state[name].shape[1])
    halves = np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1)
    assert np.array_equal(found[name].T, halves.reshape(state[name].shape))


def test_the_golden_image_is_made_again(exported):
    golden = exported.golden
    assert golden is not None
    with Image.open(exported.file(golden.image)) as picture:
        wanted = np.asarray(picture)
    runs = ((ORT, "fp32"), (OPENVINO, "fp32"), (OPENVINO, "int8"), (ORT, "fp8"))
    for engine, precision in runs:
        pipeline = Pipeline.open(exported, engine=engine, precision=precision)
        (found,) = pipeline.generate([Request(**golden.request)])
        assert psnr(found, wanted) >= golden.tolerance_db
        other = Request(**{**golden.request, "seed": 5})
        assert psnr(pipeline.generate([other])[0], wanted) < golden.tolerance_db


def test_without_guidance_and_classifier(schnell):
    assert schnell.classifier is None
    assert "classifier" not in schnell.parts
    assert "guidance" not in {tensor.name for tensor in schnell.parts["transformer"].inputs}
    assert schnell.defaults.guidance is None
    assert {p for part in schnell.parts.values() for p in part.files} == {"fp32", "fp16", "bf16"}
    pipeline = Pipeline.open(schnell)
    (image,) = pipeline.generate([pipeline.request("a lesion", seed=1)])
    assert image.std() > 0


def test_the_classifier_says_what_eager_says(exported, tiny_checkpoint):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8))
    expected = Classifier.open(exported, "eager", checkpoint=tiny_checkpoint).classify([picture])
    for engine, precision, bound in ((ORT, "fp32", 1e-5), (OPENVINO, "int8", 0.05)):
        found = Classifier.open(exported, engine, precision).classify([picture])
        assert abs(found[0].probability - expected[0].probability) < bound


def test_what_optimum_opens_is_there(exported):
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (exported.path / name).is_file()
    for part in PARTS:
        assert (exported.path / part / "config.json").is_file()
        assert (exported.path / part / "model.onnx").is_file()


def test_every_file_is_vouched_for(exported):
    listed = {data.path for data in exported.files}
    graphs = {f.path for part in exported.parts.values() for f in part.files.values()}
    there = {
        p.relative_to(exported.path).as_posix() for p in exported.path.rglob("*") if p.is_file()
    }
    assert there == listed | graphs | {"bundle.json"}


def test_nothing_is_left_beside_the_bundle(exported: Bundle, tmp_path: Path):
    beside = {path.name for path in exported.path.parent.iterdir()}
    assert not [name for name in beside if name.startswith(f".{exported.path.name}")]
    assert {p.suffix for p in exported.path.rglob("*") if p.is_file()} <= {".json", ".onnx", ".png"}
