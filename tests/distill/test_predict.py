"""Whole rasters: seams, what is kept of the raster, what is written when something goes wrong."""

import itertools
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F

from dsct_kernels.distill import card as cards
from dsct_kernels.distill import cli, evaluate, models, predict, scenes
from dsct_kernels.distill.card import Card

from .datasets.make import geotiff, potsdam_set

CLASSES, PALETTE = scenes.CLASSES, scenes.PALETTE


def save(folder: Path, bands: int = 3, card: Card | None = None, maximum: float = 255.0) -> Path:
    torch.manual_seed(0)
    normalisation = models.Normalisation((0.4,) * bands, (0.2,) * bands, maximum)
    models.save(models.build("upernet-tiny", CLASSES, normalisation=normalisation), folder)
    if card is not None:
        cards.write(folder, card)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "student", card=Card(PALETTE, window=64))


def image(height: int, width: int, bands: int = 3, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    top = 255 if dtype == np.uint8 else 2047
    blocks = rng.integers(0, top, (-(-height // 16), -(-width // 16), bands))
    return np.kron(blocks, np.ones((16, 16, 1), int))[:height, :width].astype(dtype)


def run(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments), "--device=cpu"])


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def assert_same_classes(found: np.ndarray, want: np.ndarray) -> None:
    """But for pixels where two classes are as likely as each other, to rounding."""
    assert found.shape == want.shape and (found == want).mean() > 0.999 and len(np.unique(found)) > 1


# --------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("length", "size", "overlap"), [(10, 32, 8), (32, 32, 8), (33, 32, 0), (1000, 64, 48),
                                                         (97, 32, 31), (500, 64, 16)])  # fmt: skip
def test_windows_cover_overlap_and_share_every_pixel(length, size, overlap):
    begins = evaluate.window_starts(length, size, overlap)
    assert begins[0] == 0 and begins[-1] + size >= length and begins == sorted(set(begins))
    assert all(a + size - b >= overlap for a, b in itertools.pairwise(begins))
    shares, total = predict.shares(begins, size, length), np.zeros(length)
    covered = np.zeros(length, int)
    for begin, share in zip(begins, shares, strict=True):
        assert (share > 0).all()
        total[begin : begin + size] += share
        covered[begin : begin + size] += 1
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (total[covered == 1] == 1).all()


@pytest.mark.parametrize(("height", "width", "window", "overlap", "batch"),
                         [(100, 130, 32, 8, 3), (64, 64, 64, 0, 1), (90, 40, 48, 47, 2), (33, 200, 32, 20, 5),
                          (20, 100, 32, 24, 4)])  # fmt: skip
def test_blending_gives_back_what_every_window_agrees_on(height, width, window, overlap, batch):
    """A network that sees one pixel only says the same in every window, so the sum of the shares is its answer."""
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1)).numpy()

    def network(images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).softmax(1)

    plan = predict.Plan(height, width, window, overlap)
    strips = list(predict.blended(plan, lambda y, rows: (pixels[y : y + rows], None), network, 3, batch))
    assert [y for y, _, _ in strips] == plan.rows
    got = torch.cat([said for _, said, _ in strips], 1)
    torch.testing.assert_close(got, torch.from_numpy(pixels).permute(2, 0, 1).softmax(0), rtol=1e-5, atol=1e-6)


def test_windows_agree_with_one_pass_away_from_their_borders():
    """Convolutions that see 6 pixels far: the same numbers as in one pass wherever each window that has a share sees
    all that the pass saw; and no jump where windows meet."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 9, padding=4))
    pixels = torch.rand(150, 170, 3)

    def network(images: torch.Tensor) -> torch.Tensor:
        return net(images.permute(0, 3, 1, 2)).softmax(1)

    plan = predict.Plan(150, 170, 64, 32)
    read = lambda y, rows: (pixels[y : y + rows].numpy(), None)  # noqa: E731
    got = torch.cat([said for _, said, _ in predict.blended(plan, read, network, 4)], 1)
    with torch.no_grad():
        whole = network(pixels[None])[0]
    sees = torch.ones(150, 170, dtype=torch.bool)
    for axis, (begins, length) in enumerate(((plan.rows, 150), (plan.columns, 170))):
        for begin in begins:
            for edge in (begin, begin + 64):
                if 0 < edge < length:
                    sees.narrow(axis, edge - 6, 12)[:] = False
    assert 0.2 < sees.float().mean() < 0.9
    difference = (got - whole).abs().amax(0)
    assert difference[sees].max() < 1e-5
    assert difference[~sees].max() > 1e-5  # else nothing was tested
    # The last pixels of a window have next to no share there, so that the sum is the neighbour's answer.
    hard = torch.from_numpy(np.stack([r[:2] for r in predict.shares(plan.rows, 64, 150)[1:]]))
    assert hard.max() < 0.01


def test_one_window_that_covers_all_says_what_validation_says(model, tmp_path):
    raster = geotiff(tmp_path / "r.tif", image(60, 50))
    assert run(model, raster, tmp_path / "o.tif", "--window=64") == 0
    network = models.load(model, CLASSES).eval()
    pixels = torch.from_numpy(image(60, 50)).permute(2, 0, 1)[None].float() / 255
    padded = F.pad(pixels, (0, 14, 0, 4), mode="replicate")
    with torch.no_grad():
        logits = F.interpolate(models.forward(network, padded).logits, size=(64, 64), mode="bilinear")
    assert_same_classes(read(tmp_path / "o.tif")[0], logits[0, :, :60, :50].softmax(0).argmax(0).numpy())


def test_a_file_by_blocks_is_the_strips_one_below_the_other(model, tmp_path, monkeypatch):
    raster = geotiff(tmp_path / "r.tif", image(200, 150))
    assert run(model, raster, tmp_path / "large.tif", "--window=64", "--batch=1") == 0
    monkeypatch.setattr(predict, "BLOCK", 16)
    assert run(model, raster, tmp_path / "small.tif", "--window=64", "--batch=7") == 0
    assert_same_classes(read(tmp_path / "large.tif"), read(tmp_path / "small.tif"))


# --------------------------------------------------------------------------------------------- what is kept


def test_place_palette_and_nodata_are_kept(model, tmp_path):
    pixels = np.maximum(image(120, 100), 1)
    pixels[30:50, 20:90] = 0
    raster = geotiff(tmp_path / "r.tif", pixels, nodata=0)
    assert run(model, raster, tmp_path / "o.tif") == 0
    with rasterio.open(raster) as source, rasterio.open(tmp_path / "o.tif") as out:
        assert (out.crs, out.transform, out.shape) == (source.crs, source.transform, source.shape)
        assert out.crs.to_epsg() == 32633 and out.nodata == 255 and out.dtypes == ("uint8",)
        assert out.profile["tiled"] and out.profile["compress"] == "deflate"
        table = out.colormap(1)
        assert [table[k][:3] for k in range(len(PALETTE))] == list(PALETTE) and table[255][3] == 0
        assert [out.tags(1)[f"CLASS_{k}"] for k in range(len(CLASSES))] == list(CLASSES)
        found = out.read(1)
    assert ((found == 255) == (pixels == 0).all(-1)).all() and found[found != 255].max() < len(CLASSES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "r.tif"]


def test_where_the_alpha_band_is_0_nothing_is_said(model, tmp_path):
    pixels = image(100, 90, 4)
    pixels[..., 3] = 255
    pixels[:70, :64, 3] = 0  # whole windows of it
    raster = geotiff(tmp_path / "r.tif", pixels, alpha=True)
    assert run(model, raster, tmp_path / "o.tif") == 0
    assert ((read(tmp_path / "o.tif")[0] == 255) == (pixels[..., 3] == 0)).all()


def test_a_fourth_band_that_was_infrared_in_training_is_no_alpha(tmp_path):
    raster = geotiff(tmp_path / "r.tif", image(64, 64, 4), alpha=True)
    infrared = save(tmp_path / "four", 4, Card(PALETTE, bands=(1, 2, 3, 4), file_bands=4))
    assert run(infrared, raster, tmp_path / "o.tif") == 0
    assert (read(tmp_path / "o.tif") != 255).all()
    rgb = save(tmp_path / "three", 3, Card(PALETTE, bands=(1, 2, 3), file_bands=3))
    assert run(rgb, raster, tmp_path / "o.tif", "--force") == 0
    assert ((read(tmp_path / "o.tif")[0] == 255) == (image(64, 64, 4)[..., 3] == 0)).all()


def test_sixteen_bits_are_divided_by_the_maximum_of_training(tmp_path):
    deep = save(tmp_path / "deep", card=Card(PALETTE, bands=(1, 2, 3), file_bands=3, samples="uint16"), maximum=2047.0)
    pixels = image(64, 64, dtype=np.uint16)
    raster = geotiff(tmp_path / "r.tif", pixels)
    assert run(deep, raster, tmp_path / "o.tif") == 0
    with torch.no_grad():
        images = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 2047
        said = models.forward(cards.open_model(deep)[0], images).logits
    want = F.interpolate(said, size=(64, 64), mode="bilinear").argmax(1).numpy()
    assert_same_classes(read(tmp_path / "o.tif"), want)


def test_bands_in_another_order_are_named(tmp_path):
    folder = save(tmp_path / "m", card=Card(PALETTE, bands=(1, 2, 3), file_bands=3))
    pixels = image(64, 64, 4)
    one = geotiff(tmp_path / "one.tif", pixels[..., :3])
    two = geotiff(tmp_path / "two.tif", np.ascontiguousarray(pixels[..., [2, 3, 0, 1]]), photometric="minisblack")
    assert run(folder, one, tmp_path / "o1.tif") == 0
    assert run(folder, two, tmp_path / "o2.tif", "--bands=3,4,1") == 0
    assert_same_classes(read(tmp_path / "o1.tif"), read(tmp_path / "o2.tif"))


def test_a_network_trained_on_halved_images_halves_the_raster(tmp_path):
    folder = save(tmp_path / "m", card=Card(PALETTE, downscale=2, window=64))
    small = image(64, 64)
    raster = geotiff(tmp_path / "r.tif", np.kron(small, np.ones((2, 2, 1), np.uint8)))
    assert run(folder, raster, tmp_path / "o.tif") == 0
    with torch.no_grad():
        images = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
        said = models.forward(cards.open_model(folder)[0], images).logits
    want = F.interpolate(said, size=(128, 128), mode="bilinear").argmax(1).numpy()
    assert_same_classes(read(tmp_path / "o.tif"), want)


def test_probabilities_are_those_of_the_classes(model, tmp_path):
    raster = geotiff(tmp_path / "r.tif", image(100, 80))
    assert run(model, raster, tmp_path / "o.tif") == run(model, raster, tmp_path / "p.tif", "--probabilities") == 0
    with rasterio.open(tmp_path / "p.tif") as file:
        assert file.descriptions == CLASSES and file.dtypes[0] == "float32"
    said = read(tmp_path / "p.tif")
    np.testing.assert_allclose(said.sum(0), 1, rtol=1e-5)
    assert_same_classes(said.argmax(0).astype(np.uint8), read(tmp_path / "o.tif")[0])


def test_any_other_model_folder_serves(tmp_path):
    """Without a card: the first bands, eight bits, and colours of no meaning."""
    folder = save(tmp_path / "m")
    raster = geotiff(tmp_path / "r.tif", image(64, 64))
    assert run(folder, raster, tmp_path / "o.tif") == 0
    with rasterio.open(tmp_path / "o.tif") as file:
        assert len({file.colormap(1)[k] for k in range(len(CLASSES))}) == len(CLASSES)


# --------------------------------------------------------------------------------------------- the card


def test_a_run_leaves_a_card_in_every_model_folder(tmp_path):
    root, out = tmp_path / "potsdam", tmp_path / "run"
    potsdam_set(root, "RGBIR")
    tiny = ["--batch=2", "--crop=32", "--window=64", "--teacher-steps=1", "--student-steps=1", "--device=cpu"]
    tiny += ["--teacher=upernet-tiny", "--scale-jitter=0", "--no-pictures", "--arms=alone"]
    command = ["--data=potsdam", f"--root={root}", "--bands=IRRG", *tiny, f"--out={out}"]
    assert cli.main(command) == 0
    _, card, classes = cards.open_model(out / "student-alone")
    assert card == cards.read(out / "teacher") and classes[4] == "Car" and card.palette[4] == (255, 255, 0)
    assert (card.bands, card.file_bands, card.samples, card.window, card.data) == ((4, 1, 2), 4, "uint8", 64, "potsdam")
    assert card.trained_with["torch"] == torch.__version__
    raster = next(root.rglob("top_potsdam_2_13_RGBIR.tif"))
    assert run(out / "student-alone", raster, tmp_path / "o.tif") == 0
    matrix = json.loads((out / "results.json").read_text())["alone"]["confusion"]
    assert sum(map(sum, matrix)) > 0 and len(matrix) == len(classes)


@pytest.mark.parametrize(("key", "value"), [("palette", [["#12"]]), ("palette", 3), ("bands", [0]), ("bands", []),
                                            ("window", 1.5), ("samples", "float32"), ("palette", ["#000000"]),
                                            ("bands", [1, 2])])  # fmt: skip
def test_a_damaged_card_is_named(tmp_path, capsys, key, value):
    folder = save(tmp_path / "m", card=Card(PALETTE))
    saved = json.loads((folder / cards.FILE).read_text())
    (folder / cards.FILE).write_text(json.dumps({**saved, key: value}))
    assert run(folder, geotiff(tmp_path / "r.tif", image(64, 64)), tmp_path / "o.tif") == 2
    assert f"{folder / cards.FILE}: {key}" in capsys.readouterr().err and not (tmp_path / "o.tif").exists()


# --------------------------------------------------------------------------------------------- what goes wrong


def test_what_cannot_be_is_refused_and_nothing_is_written(model, tmp_path, capsys):
    raster = geotiff(tmp_path / "r.tif", image(64, 64))
    text, out = tmp_path / "text.tif", tmp_path / "o.tif"
    text.write_text("no raster")
    before = raster.read_bytes()
    (tmp_path / "link.tif").symlink_to(raster)

    def refused(*arguments: object) -> str:
        assert run(*arguments) == 2
        assert raster.read_bytes() == before
        assert not out.exists()
        return capsys.readouterr().err

    assert "expected JPEG, PNG or TIFF" in refused(model, text, out)
    assert "missing.tif: cannot be opened" in refused(model, tmp_path / "missing.tif", out)
    assert "no model folder" in refused(tmp_path, raster, out)
    assert "is the raster itself" in refused(model, raster, raster, "--force")
    assert "is the raster itself" in refused(model, raster, tmp_path / "link.tif", "--force")
    assert "write over it with --force" in refused(model, raster, text)
    assert text.read_text() == "no raster"
    assert "is a folder" in refused(model, raster, tmp_path)
    assert "there is no folder" in refused(model, raster, tmp_path / "no" / "o.tif")
    assert "has 2 bands, but the network reads bands 1, 2, 3" in refused(
        model, geotiff(tmp_path / "two.tif", image(64, 64, 2)), out
    )
    assert "samples are uint16" in refused(model, geotiff(tmp_path / "deep.tif", image(64, 64, dtype=np.uint16)), out)
    assert "--overlap" in refused(model, raster, out, "--window=64", "--overlap=64")
    assert "--window" in refused(model, raster, out, "--window=16")
    assert "--batch" in refused(model, raster, out, "--batch=0")
    assert "--bands: expected 3 numbers" in refused(model, raster, out, "--bands=1,2")
    assert "the network reads bands 1, 2, 7" in refused(model, raster, out, "--bands=1,2,7")
    assert run(model, raster, text, "--force") == 0 and read(text).shape == (1, 64, 64)


def test_a_damaged_raster_and_ctrl_c_leave_out_as_it_was(model, tmp_path, capsys, monkeypatch):
    raster = geotiff(tmp_path / "r.tif", np.random.default_rng(0).integers(0, 255, (300, 200, 3)).astype(np.uint8))
    cut = tmp_path / "cut.tif"
    whole = raster.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "o.tif"
    out.write_bytes(b"what was there before")
    assert run(model, cut, out, "--force") == 2
    assert "cut.tif" in capsys.readouterr().err

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.Writer, "write_block_row", interrupted)
        assert run(model, raster, out, "--force") == cli.INTERRUPTED
    assert out.read_bytes() == b"what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.tif", "o.tif", "r.tif"]


def test_a_full_disk_leaves_no_file(model, tmp_path, capsys):
    """As a limit on the size of a file, past which GDAL goes on as if nothing were wrong."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3)).astype(np.uint8)
    raster = geotiff(tmp_path / "r.tif", noise)
    assert run(model, raster, tmp_path / "whole.tif") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole.tif").stat().st_size // 2, hard))
    try:
        assert run(model, raster, tmp_path / "o.tif") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written whole" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.tif", "whole.tif"]


def test_a_raster_without_a_place_smaller_than_a_window(model, tmp_path):
    with rasterio.open(tmp_path / "r.png", "w", driver="PNG", width=5, height=3, count=3, dtype="uint8") as file:
        file.write(image(3, 5).transpose(2, 0, 1))
    assert run(model, tmp_path / "r.png", tmp_path / "o.tif") == 0
    with rasterio.open(tmp_path / "o.tif") as out:
        assert out.shape == (3, 5) and out.crs is None and out.transform.is_identity
