"""What is shipped: the folder that transformers opens, and the ONNX file that says the same as PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dsct_kernels.distill import card as cards
from dsct_kernels.distill import cli, export, models, scenes
from dsct_kernels.distill.card import Card
from dsct_kernels.distill.config import Config

from .datasets.make import geotiff
from .test_predict import assert_same_classes, image, run
from .test_predict import read as read_raster

for package in export.ONNX_PACKAGES:
    pytest.importorskip(package, reason=f"the extra [export] is not installed: no {package}")


def saved(folder: Path, preset: str = "upernet-tiny") -> Path:
    torch.manual_seed(0)
    models.save(models.build(preset, scenes.CLASSES), folder)
    cards.write(folder, Card(scenes.PALETTE, data="synthetic", window=64))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The export of a student that lies in a run's folder, beside its teacher."""
    folder = tmp_path_factory.mktemp("run")
    Config(scenes=3, scene_size=96).save(folder / "config.json")
    saved(folder / "teacher", "upernet-small")
    saved(folder / "student-dsct")
    arguments = ["export", str(folder / "student-dsct"), str(folder / "exported"), "--threads=1"]
    assert cli.main(arguments) == 0
    return folder / "exported"


def test_onnx_says_what_pytorch_says_on_any_batch_height_and_width(exported):
    found = json.loads((exported / "export.json").read_text())
    assert found["agrees"] and found["free_dimensions"] == "batch, height, width" and found["failed_with_more"] == {}
    assert found["argmax_agreement"] > 0.999 and found["max_abs_difference"] < 1e-3 and found["pixels"] > 4 * 64 * 64
    session = export.session_of(exported / "model.onnx", 1)
    network = export.Deployed(cards.open_model(exported)[0])
    for shape in ((3, 3, 96, 160), (1, 3, 50, 37)):
        pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
        with torch.no_grad():
            want = network(torch.from_numpy(pixels)).numpy()
        got = session.run(None, {"pixels": pixels})[0]
        assert got.shape == (shape[0], len(scenes.CLASSES), *shape[2:])
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_the_export_stands_on_its_own(exported, tmp_path):
    """transformers opens it, `predict` reads it, and ONNX tells the classes of raw pixels without another word."""
    from transformers import AutoModelForSemanticSegmentation

    assert AutoModelForSemanticSegmentation.from_pretrained(exported, local_files_only=True).config.num_labels == 5
    pixels = image(64, 64)
    assert run(exported, geotiff(tmp_path / "r.tif", pixels), tmp_path / "o.tif") == 0
    session = export.session_of(exported / "model.onnx", 1)
    said = session.run(None, {"pixels": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0]
    assert_same_classes(read_raster(tmp_path / "o.tif"), said.argmax(1))
    file = (exported / "model.onnx").read_bytes()
    assert b".py" not in file and len(file) < 2 * (exported / "model.safetensors").stat().st_size
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(scenes.CLASSES) and metadata["samples"] == "uint8"


def test_latency_and_size_stand_beside_the_teachers(exported):
    networks = json.loads((exported / "export.json").read_text())["networks"]
    assert list(networks) == ["network, PyTorch", "network, ONNX", "teacher, PyTorch"]
    assert all(n["milliseconds"] > 0 and n["megabytes"] > 0 for n in networks.values())
    assert networks["teacher, PyTorch"]["parameters"] > networks["network, ONNX"]["parameters"]
    assert networks["network, ONNX"]["megabytes"] == round((exported / "model.onnx").stat().st_size / 1e6, 3)


def test_a_network_that_disagrees_is_refused_and_nothing_is_left(exported, tmp_path, capsys, monkeypatch):
    """The file of the export before, against weights that were changed since."""
    other = saved(tmp_path / "other")
    file = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "to_onnx", lambda network, path, *_: path.write_bytes(file))
    model = cards.open_model(other)[0]
    with torch.no_grad():
        list(model.parameters())[-2].mul_(1.5)
    models.save(model, other)
    picture = geotiff(tmp_path / "r.tif", image(64, 64))
    assert cli.main(["export", str(other), str(tmp_path / "o"), f"--image={picture}"]) == export.DISAGREES
    assert "disagree" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "r.tif"]
    assert not export.agree({"max_abs_difference": 0.0, "largest_logit": 1.0, "argmax_agreement": 0.99})
    assert not export.agree({"max_abs_difference": float("inf"), "largest_logit": 1.0, "argmax_agreement": 1.0})


def test_what_cannot_be_is_refused(exported, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert cli.main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    model = exported.parent / "student-dsct"
    alone = saved(tmp_path / "alone")
    assert "put another in its place with --force" in refused(model, exported)
    assert "no export of before" in refused(alone, model, "--force")
    assert "holds the model itself" in refused(model, model.parent, "--force")
    assert "name images with --image" in refused(alone, tmp_path / "o")
    assert "no model folder" in refused(tmp_path, tmp_path / "o")
    small = geotiff(tmp_path / "small.tif", image(32, 32))
    assert "expected 64 x 64 or more" in refused(alone, tmp_path / "o", "--image", small)
    deep = geotiff(tmp_path / "deep.tif", image(64, 64, dtype=np.uint16))
    assert "of uint16, but the network reads" in refused(alone, tmp_path / "o", "--image", deep)
    assert "--size" in refused(alone, tmp_path / "o", "--size=50")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("length", [1, 5, 6, 7, 16, 33])
@pytest.mark.parametrize("cells", [(1, 1), (2, 3), (6, 6)])
def test_pooling_by_matrices_is_adaptive_pooling(length, cells):
    x = torch.rand(2, 3, length, length + 4, dtype=torch.float64)
    torch.testing.assert_close(export.AveragePool(cells)(x), nn.AdaptiveAvgPool2d(cells)(x))
