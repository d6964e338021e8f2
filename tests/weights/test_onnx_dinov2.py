"""A small random Dinov2Model is written as the exporter writes one, and must come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import GraphProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

from osm_lightning.weights.onnx_dinov2 import PREFIX, RENAMED, convert

EMBEDDED = "embeddings.position_embeddings"


@pytest.fixture(scope="module")
def model() -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=42,
            patch_size=14,
            use_mask_token=False,
        )
    )
    for parameter in model.parameters():  # a bias of zeros or a scale of ones could be mistaken for another
        torch.nn.init.normal_(parameter)
    return model.eval()


def exported(model: Dinov2Model) -> GraphProto:
    """The exporter's graph, as far as names and bias additions go; linear weights transposed and anonymous."""
    initializers, nodes = [], []
    for number, (new_name, value) in enumerate(model.state_dict().items()):
        name = PREFIX + new_name
        for old, new in RENAMED:
            name = name.replace(new, old)
        if new_name == EMBEDDED:
            initializers.append(numpy_helper.from_array(value[:, :1].numpy(), f"onnx::Concat_{number}"))
            initializers.append(numpy_helper.from_array(value[:, 1:].numpy(), f"onnx::Reshape_{number}"))
        elif value.ndim == 2:
            anonymous, bias = f"onnx::MatMul_{number}", name.removesuffix("weight") + "bias"
            initializers.append(numpy_helper.from_array(value.T.contiguous().numpy(), anonymous))
            summands = [bias, f"product_{number}"] if number % 2 else [f"product_{number}", bias]
            nodes.append(helper.make_node("Add", summands, [f"sum_{number}"]))
            nodes.append(helper.make_node("MatMul", ["input", anonymous], [f"product_{number}"]))
        else:
            initializers.append(numpy_helper.from_array(value.numpy(), name))
    decoder = torch.ones(128, 3)
    initializers.append(numpy_helper.from_array(decoder.numpy(), "onnx::MatMul_9999"))
    nodes.append(helper.make_node("MatMul", ["input", "onnx::MatMul_9999"], ["saliency"]))
    # Neither order carries the names, so that a reader that leans on it fails.
    return helper.make_graph(nodes[::-1], "export", [], [], initializers[::-1])


def write(graph: GraphProto, folder: Path) -> tuple[Path, Path]:
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    (folder / "out").mkdir()
    return folder / "model.onnx", folder / "out"


def without(graph: GraphProto, name: str) -> GraphProto:
    kept = [tensor for tensor in graph.initializer if tensor.name != name]
    assert len(kept) == len(graph.initializer) - 1
    return helper.make_graph(graph.node, "export", [], [], kept)


def test_the_model_comes_back_from_its_export(model: Dinov2Model, tmp_path: Path) -> None:
    source, out = write(exported(model), tmp_path)
    convert(source, out)
    again, info = Dinov2Model.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)
    pixels = torch.randn(1, 3, 42, 42)
    with torch.no_grad():  # the config too: heads, patch and image size
        torch.testing.assert_close(again.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert again.config.image_size == 42
    assert (out / "preprocessor_config.json").exists()


def test_weights_without_a_name_are_counted(model: Dinov2Model, tmp_path: Path) -> None:
    bias = f"{PREFIX}encoder.layer.1.mlp.fc2.bias"
    with pytest.raises(ValueError, match=r"2 weights are missing \(encoder\.layer\.1\.mlp\.fc2\.bias, .*fc2\.weight\)"):
        convert(*write(without(exported(model), bias), tmp_path))


def test_a_graph_without_a_backbone_is_refused(model: Dinov2Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no backbone\.embeddings\.cls_token"):
        convert(*write(without(exported(model), f"{PREFIX}embeddings.cls_token"), tmp_path))


def test_a_position_embedding_that_cannot_be_told_is_refused(model: Dinov2Model, tmp_path: Path) -> None:
    number = list(model.state_dict()).index(EMBEDDED)
    with pytest.raises(ValueError, match=r"shapes \[\(1, 9, 128\)\], but a position embedding"):
        convert(*write(without(exported(model), f"onnx::Concat_{number}"), tmp_path))
