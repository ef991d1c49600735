"""Windows of large rasters, bands, 8 and 16 bits, nodata and alpha, and normalisation from the data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dsct_kernels.distill import compare, data, evaluate, models, trial
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import identity, tiles_of
from dsct_kernels.distill.datasets.tile import IGNORE, Tile, band_names, downscaled
from dsct_kernels.distill.files import DataError
from dsct_kernels.distill.images import read_bands

from . import make

PLAIN = make.YAML.replace("bands: [R, G, B, IR]\n", "")


def of_folder(root: Path, **settings) -> Config:
    return Config(data="folder", root=str(root), **settings)


# ---- windows


def test_a_window_of_a_geotiff_is_that_part_of_the_whole(tmp_path):
    make.folder_set(tmp_path)
    (tile, *_) = tiles_of(of_folder(tmp_path))
    whole = tile.read(0, 0, 64, 64)
    assert whole.dtype == np.uint16 and whole.shape == (64, 64, 5)
    assert np.array_equal(tile.read(5, 17, 30, 40), whole[5:35, 17:57])


@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_sixteen_bits_and_four_bands_are_cached_as_they_are_read(tmp_path, scale):
    make.folder_set(tmp_path, nodata=None)
    image = make.seen(make.classes(4), 4, np.uint16)
    image[..., 2] = 60_000  # beyond what int16 holds
    make.geotiff(tmp_path / "images/a.tif", image)
    tiles = tiles_of(of_folder(tmp_path))
    cached, windowed = data.Pixels(tiles, 64), data.Pixels(tiles, 0)
    assert cached.flat is not None and cached.flat.dtype == torch.int16 and windowed.flat is None
    crops = [data.Crops(pixels, 48, 3, 1, scale, 0.1) for pixels in (cached, windowed)]
    for step in range(3):
        assert all(torch.equal(x, y) for x, y in zip(crops[0][step], crops[1][step], strict=True))
    images = data.scaled(cached.window(0, 0, 0, 64, 64), 65_535)
    assert torch.equal(images, torch.from_numpy(image.astype(np.float32)) / 65_535)
    batch, labels = data.images(crops[0][0], 65_535)
    assert batch.shape == (3, 4, 48, 48) and labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) <= {0, 1, 2, IGNORE}


def test_downscaling_keeps_bands_and_bits(tmp_path):
    make.folder_set(tmp_path)
    (small, *_) = downscaled(tiles_of(of_folder(tmp_path)), 2)
    (tile, *_) = tiles_of(of_folder(tmp_path))
    pixels, whole = small.read(4, 4, 10, 12), tile.read(8, 8, 20, 24)
    assert pixels.dtype == np.uint16 and (small.bands, small.samples) == (4, "uint16")
    assert pixels[0, 0, :4] == pytest.approx(whole[:2, :2, :4].mean((0, 1)), abs=0.5)
    assert pixels[0, 0, 4] == whole[1, 1, 4]


READER = """
import resource, sys
import torch
import rasterio
from dsct_kernels.distill import data, evaluate, models
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import tiles_of

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

torch.set_num_threads(1)
tiles = tiles_of(Config(data="potsdam", root=sys.argv[1]))
before = peak()
pixels = data.Pixels(tiles, 64, "cpu", data.statistics(tiles))
assert pixels.flat is None
crops = data.Crops(pixels, 256, 8, 0, 0.5, 0.1)
for step in range(6):
    images, labels = data.images(crops[step], 255.0)
net = torch.nn.Conv2d(3, 6, 1, stride=32)
strips = evaluate.predicted(pixels, 0, 512, 6, torch.device("cpu"), net)
rows = sum(len(next(strips)[1]) for _ in range(3))
print(before, peak(), rows)
"""


def test_a_raster_of_6000_by_6000_is_never_whole_in_memory(tmp_path):
    """Crops and evaluation: 250 MB more than the imports, where pixels, scores and classes alone would be 1.3 GB."""
    blocks = np.random.default_rng(0).integers(0, 6, (60, 60))
    label = np.kron(blocks, np.ones((100, 100), np.uint8)).astype(np.uint8)
    options = {"blockxsize": 256, "blockysize": 256, "compress": "zstd"}
    from dsct_kernels.distill.datasets import potsdam

    colours = make.coloured(label, potsdam.PALETTE)
    make.geotiff(tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif", colours, **options)
    make.geotiff(tmp_path / "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", colours // 2 + 60, **options)
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, rows = map(int, done.stdout.split())
    assert rows > 1000
    assert after - before < 250, f"{after - before} MB"
    assert after < 2048, f"{after} MB"


# ---- predictions by strips


class Seeing(nn.Module):
    """Logits that depend on the whole window, so that overlapping windows differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 5, padding=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = F.avg_pool2d(self.conv(image), 4)
        return 20 * (logits - logits.mean((2, 3), keepdim=True)) + image.mean()


@pytest.mark.parametrize("size", [(150, 97), (64, 64), (20, 200), (257, 65)])
def test_strips_are_the_prediction_of_the_whole_tile(size):
    height, width = size
    pixels = data.Pixels([Noise("noise", "noise", height, width)], 0)
    net = Seeing().eval()
    window = 64
    scores = torch.zeros(5, height, width)
    with torch.no_grad():
        for y in evaluate.window_starts(height, window):
            for x in evaluate.window_starts(width, window):
                image = pixels.window(0, y, x, window, window)[..., :3].permute(2, 0, 1)[None].float() / 255
                h, w = image.shape[-2:]
                image = F.pad(image, (0, -w % 32, 0, -h % 32), mode="replicate")
                logits = F.interpolate(net(image), size=image.shape[-2:], mode="bilinear", align_corners=False)
                scores[:, y : y + h, x : x + w] += logits[0, :, :h, :w].softmax(0)
    strips = list(evaluate.predicted(pixels, 0, window, 5, torch.device("cpu"), net))
    assert [y for y, _ in strips] == evaluate.window_starts(height, window)
    assert torch.equal(torch.cat([classes for _, classes in strips]), scores.argmax(0))
    assert len(scores.argmax(0).unique()) > 1


class Noise(Tile):
    def read(self, y, x, height, width):
        blocks = np.random.default_rng(0).integers(0, 255, (self.height // 8 + 1, self.width // 8 + 1, 4))
        return np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)[y : y + height, x : x + width]


# ---- nodata, alpha, samples


def test_where_an_image_holds_no_data_its_label_is_ignored(tmp_path):
    """By a nodata value, by alpha; and where it says nothing, everything counts."""
    written = make.folder_set(tmp_path, PLAIN)
    image = written["a"][0][..., :3].astype(np.uint8)
    expected = {}
    for name, alpha, nodata in (("a", None, 0), ("b", np.where(np.arange(64) < 20, 0, 255), None), ("c", None, None)):
        pixels = image.copy()
        pixels[:4, :9] = 0
        if alpha is not None:
            pixels = np.dstack([pixels, np.broadcast_to(alpha, (64, 64)).astype(np.uint8)])
        make.geotiff(tmp_path / f"images/{name}.tif", pixels, nodata=nodata, alpha=alpha is not None)
        make.geotiff(tmp_path / f"labels/{name}_mask.tif", np.full((64, 64), 7, np.uint8))
        expected[name] = np.full((64, 64), 1)
    pixels = {tile.name: tile.read(0, 0, 64, 64) for tile in tiles_of(of_folder(tmp_path))}
    assert {p.shape[-1] for p in pixels.values()} == {4}  # an alpha band is none of the image
    expected["a"][(image == 0).all(-1)] = IGNORE
    expected["a"][:4, :9] = IGNORE
    expected["b"][:, :20] = IGNORE
    assert all(np.array_equal(pixels[name][..., -1], expected[name]) for name in "abc")
    assert (pixels["b"][:, :20, :3] == 0).all()


def test_samples_of_two_kinds_and_of_floats_are_refused(tmp_path):
    make.folder_set(tmp_path)
    make.geotiff(tmp_path / "images/b.tif", make.seen(make.classes(4), 4))
    with pytest.raises(DataError, match=r"b.tif: samples are uint8, but those of .*a.tif are uint16; convert one"):
        tiles_of(of_folder(tmp_path))
    make.geotiff(tmp_path / "images/b.tif", make.seen(make.classes(4), 4).astype(np.float32))
    with pytest.raises(DataError, match=r"b.tif: samples are float32, expected uint8 or uint16; convert it"):
        tiles_of(of_folder(tmp_path))


def test_an_image_that_lacks_a_band_is_named(tmp_path):
    make.folder_set(tmp_path)
    make.geotiff(tmp_path / "images/b.tif", make.seen(make.classes(4), 3, np.uint16))
    with pytest.raises(DataError, match=r"b.tif: has 3 bands, so there is no band 4; choose others with --bands"):
        tiles_of(of_folder(tmp_path))
    assert len(tiles_of(of_folder(tmp_path, bands="RGB"))) == 3
    with pytest.raises(DataError, match=r"b.tif: has 3 bands, so there is no band 4"):
        read_bands(tmp_path / "images/b.tif", (4,), 0, 0, 8, 8)


@pytest.mark.parametrize(
    ("text", "names"),
    [("RGB", "R G B"), ("IRRG", "IR R G"), ("RGBIR", "R G B IR"), ("red, nir", "red nir"), ("pan", "pan"), ("3", "3")],
)
def test_names_of_bands(text, names):
    assert band_names(text) == tuple(names.split())


# ---- normalisation


def test_statistics_are_mean_and_deviation_of_what_holds_data(tmp_path):
    written = make.folder_set(tmp_path)
    found = data.statistics(tiles_of(of_folder(tmp_path)))
    assert found.maximum == 1023  # the largest sample is below 1024: one of 10 bits
    valid = [(image, label) for image, label in written.values()]
    values = np.concatenate([image[(image != 0).any(-1)] for image, _ in valid]) / 1023
    assert found.mean == pytest.approx(values.mean(0), abs=2e-6) and len(found.mean) == 4
    assert found.std == pytest.approx(values.std(0), abs=2e-6)


def test_images_without_data_have_no_statistics(tmp_path):
    make.folder_set(tmp_path)
    for name in "abc":
        make.geotiff(tmp_path / f"images/{name}.tif", np.zeros((64, 64, 4), np.uint16), nodata=0)
    with pytest.raises(DataError, match=r"a: no pixel of 3 training tiles holds data"):
        data.statistics(tiles_of(of_folder(tmp_path)))


def test_the_oldest_sets_keep_the_normalisation_of_imagenet_and_others_have_their_own(tmp_path):
    train, val = data.load_pixels(Config(scenes=3, scene_size=64), torch.device("cpu"))
    assert train.normalisation == val.normalisation == models.IMAGENET
    make.potsdam_set(tmp_path)
    train, val = data.load_pixels(Config(data="potsdam", root=str(tmp_path)), torch.device("cpu"))
    assert train.normalisation == val.normalisation == data.statistics(train.tiles) != models.IMAGENET


# ---- networks of other than three bands

FOUR = models.Normalisation((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8), 1023.0)


@pytest.mark.parametrize("preset", ["segformer-tiny", "upernet-tiny", "mobilenet-0.25"])
def test_a_network_of_four_bands_is_saved_and_loaded(tmp_path, preset):
    model = models.build(preset, ("a", "b"), normalisation=FOUR).eval()
    models.save(model, tmp_path / "model")
    saved = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
    assert saved["image_mean"] == pytest.approx(FOUR.mean) and saved["rescale_factor"] == 1 / 1023
    again = models.load(tmp_path / "model", ("a", "b"), normalisation=FOUR._replace(mean=(0, 0, 0, 0))).eval()
    images = torch.rand(1, 4, 32, 32)
    assert torch.allclose(models.forward(again, images).logits, models.forward(model, images).logits, atol=1e-6)
    assert models.gflops(model, 32) > 0
    with pytest.raises(DataError, match=r"it reads images of 4 bands, but those of the data have 3; see --bands"):
        models.load(tmp_path / "model", ("a", "b"))


def test_a_network_sees_the_same_samples_whatever_the_data_are_divided_by(tmp_path):
    model = models.build("segformer-tiny", ("a", "b"), normalisation=FOUR).eval()
    models.save(model, tmp_path / "model")
    other = models.load(tmp_path / "model", ("a", "b"), normalisation=FOUR._replace(maximum=2047.0)).eval()
    samples = torch.randint(0, 1024, (1, 4, 32, 32)).float()
    one, two = (models.forward(net, samples / top).logits for net, top in ((model, 1023), (other, 2047)))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_rescale_factor_that_is_none_is_named(tmp_path):
    models.save(models.build("segformer-tiny", ("a", "b")), tmp_path / "model")
    path = tmp_path / "model/preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 0}))
    with pytest.raises(DataError, match=r"preprocessor_config.json: rescale_factor: expected a number above 0, got 0"):
        models.load(tmp_path / "model", ("a", "b"))


def test_a_comparison_of_four_bands(tmp_path):
    make.folder_set(tmp_path / "set")
    cfg = make.tiny("folder", tmp_path / "set", val_tiles=("c",), teacher="segformer-tiny")
    job = trial.Job(cfg, "kd", (), tmp_path)
    trial.train_teacher(job)
    trial.ask_teacher(job)
    assert 0 <= trial.run(job)["accuracy"] <= 1
    with pytest.raises(ValueError, match=r"efficientnet-lite0 reads images of 3 bands, but those of the data have 4"):
        trial.build("efficientnet-lite0", ("a", "b"), torch.device("cpu"), FOUR)


def test_a_comparison_of_fewer_groups_than_folds_is_refused(tmp_path):
    make.converted_set(tmp_path, 7, ("0", "1"), ("2",))
    with pytest.raises(DataError, match=r"--data loveda: 2 groups of tiles, of which no 3 folds can be made"):
        compare.folds_of(Config(data="loveda", root=str(tmp_path)))


# ---- what was run before


def test_a_run_knows_the_finished_runs_of_the_comparison_on_dubai():
    """Their keys are made of the settings alone, so a setting that is added must not reach them."""
    path = Path(__file__).parents[3] / "benchmarks/results/compare-dubai.jsonl"
    if not path.is_file():
        pytest.skip("no results here")
    known = set(Config.__dataclass_fields__)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in row["settings"].items() if k in known}
        cfg = Config(**{"root": "anywhere", "teacher": row["teacher"], **settings})
        assert trial.Job(cfg, row["method"], tuple(row["settings"]["strides"] or ()), Path()).key == row["key"]


def test_bands_labels_and_a_folders_yaml_make_another_run(tmp_path):
    assert identity(Config()) == identity(Config(data="dubai", root="x")) == {}
    keys = {
        trial.Job(Config(data="potsdam", root="x", **settings), "alone", (), Path()).key
        for settings in ({}, {"bands": "RGB"}, {"bands": "IRRG"}, {"labels": "eroded"})
    }
    assert len(keys) == 4
    make.folder_set(tmp_path)
    one = trial.Job(of_folder(tmp_path), "kd", (), Path())
    before = (one.key, one.teacher_key)
    (tmp_path / "data.yaml").write_text(make.YAML.replace("val: [c]", "val: [b]"))
    assert before[0] != one.key and before[1] != one.teacher_key


def test_settings_of_an_earlier_version_are_read(tmp_path):
    path = tmp_path / "config.json"
    Config(scenes=3).save(path)
    saved = json.loads(path.read_text())
    del saved["bands"], saved["labels"]
    path.write_text(json.dumps(saved))
    assert Config.load(path) == Config(scenes=3)


def test_turned_labels_of_numbers_agree_with_turned_images(tmp_path):
    """EXIF orientation holds for whatever is read, not for photographs alone."""
    numbers = make.classes(4)[:40, :56]
    Image.fromarray(numbers).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert np.array_equal(read_bands(tmp_path / "a.tif", (1,), 3, 5, 30, 20)[..., 0], np.rot90(numbers, -1)[3:33, 5:25])
