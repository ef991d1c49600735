"""Peak memory and time of `dsct-distill predict` on a raster that is made for it.

python benchmarks/predict_raster.py                    # 20,000 x 20,000: minutes
python benchmarks/predict_raster.py --height 2000      # as much memory
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from dsct_kernels.distill import models, scenes

SCENE = 1000


def make_raster(path: Path, height: int, width: int) -> None:
    """Drawn scenes, one beside the other, as a tiled GeoTIFF of three bands; written scene by scene."""
    rng = np.random.default_rng(0)
    drawn = [scenes.draw_scene(seed, SCENE)[0].transpose(2, 0, 1) for seed in range(4)]
    cache = rasterio.Env(GDAL_CACHEMAX=64)  # MB: a child's peak begins where its parent's memory was
    with cache, rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=3, dtype="uint8", crs="EPSG:32633", tiled=True,
        transform=rasterio.Affine(0.05, 0, 366_000, 0, -0.05, 5_807_000), compress="deflate", BIGTIFF="IF_SAFER",
    ) as file:  # fmt: skip
        for y in range(0, height, SCENE):
            for x in range(0, width, SCENE):
                h, w = min(SCENE, height - y), min(SCENE, width - x)
                file.write(drawn[rng.integers(4)][:, :h, :w], window=Window(x, y, w, h))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--height", type=int, default=20_000, help="of the raster, in pixels (20000)")
    p.add_argument("--width", type=int, default=20_000, help="of the raster, in pixels (20000)")
    p.add_argument("--preset", choices=tuple(models.PRESETS), default="upernet-tiny", help="network, untrained")
    p.add_argument("--window", default="512")
    own = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raster, model, out = (Path(folder) / name for name in ("raster.tif", "model", "out.tif"))
        make_raster(raster, own.height, own.width)
        models.save(models.build(own.preset, scenes.CLASSES), model)
        command = [sys.executable, "-m", "dsct_kernels.distill", "predict", model, raster, out, "--device=cpu"]
        started = time.perf_counter()
        subprocess.run([*map(str, command), f"--window={own.window}"], check=True)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{own.width} x {own.height}: {used.ru_maxrss / 1024:.0f} MiB at its peak, {seconds:.0f} s, of which "
            f"{used.ru_utime + used.ru_stime:.0f} s of CPU time; {own.preset}, windows of {own.window}; the raster has "
            f"{raster.stat().st_size / 2**20:.0f} MiB, its map {out.stat().st_size / 2**20:.1f}"
        )


if __name__ == "__main__":
    main()
