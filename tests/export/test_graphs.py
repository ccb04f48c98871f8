"""Viewers and other tools open every graph of a bundle: checked, and all its shapes known."""

from __future__ import annotations

import onnx
import pytest

from dermaflux.bundle import Bundle


def graphs(bundle: Bundle) -> list[str]:
    return [file.path for part in bundle.parts.values() for file in part.files.values()]


def unknown(model: onnx.ModelProto) -> list[str]:
    """Results of nodes without an element type or a rank."""
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    results = (name for node in model.graph.node for name in node.output if name)
    return [
        name
        for name in results
        if name not in values
        or not values[name].type.tensor_type.elem_type
        or not values[name].type.tensor_type.HasField("shape")
    ]


def test_the_checker_finds_nothing(exported):
    paths = graphs(exported)
    assert len(paths) >= len(exported.parts)
    for path in paths:
        onnx.checker.check_model(str(exported.file(path)), full_check=True)


def test_shape_inference_leaves_nothing_unknown(exported, tmp_path):
    for number, path in enumerate(graphs(exported)):
        # By path: a graph with external data may pass what protobuf holds in memory.
        target = tmp_path / f"{number}.onnx"
        onnx.shape_inference.infer_shapes_path(
            str(exported.file(path)), str(target), strict_mode=True, data_prop=True
        )
        model = onnx.load(str(target), load_external_data=False)
        assert model.graph.node, path
        assert not unknown(model), path


@pytest.mark.parametrize("operator", ["NoSuchOperator", "MatMul"])
def test_a_graph_that_is_wrong_would_be_found(exported, tmp_path, operator):
    path = exported.file(exported.parts["text_encoder"].files["fp32"].path)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == "Add")
    node.op_type = operator
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
