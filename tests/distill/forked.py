"""Runs in processes of their own that start in a tenth of a second: forked from one that has imported everything.

Multiprocessing's fork server imports this module and computes nothing with threads, so that its children may.
"""

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch
import torch.distributed.checkpoint.state_dict
import torch.utils.tensorboard
import torchmetrics.classification  # noqa: F401
from torch import nn

from dsct_kernels.distill import check, cli, evaluate, loop, models, report, run, scenes  # noqa: F401
from dsct_kernels.distill.config import Config
from dsct_kernels.distill.datasets import synthetic
from dsct_kernels.distill.presets import Preset

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def micro(bands: int, labels: dict[str, Any], **settings: Any) -> nn.Module:
    """The smallest SegFormer, with dropout, stochastic depth and batch normalisation."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 1, 1]}
    config = SegformerConfig(**sizes, decoder_hidden_size=8, num_channels=bands, **labels, **settings)
    return SegformerForSemanticSegmentation(config)


def sober(bands: int, labels: dict[str, Any]) -> nn.Module:
    """The same without what depends on how a batch is divided, or on chance."""
    network = micro(bands, labels, drop_path_rate=0.0, classifier_dropout_prob=0.0)
    network.decode_head.batch_norm = nn.GroupNorm(2, 8)
    return network


models.PRESETS.update(micro=Preset("SegFormer", micro), sober=Preset("SegFormer", sober))
TINY = ["--scenes=3", "--scene-size=64", "--crop=32", "--window=64", "--device=cpu", "--no-pictures"]
for _batch in (1, 2):  # what is found out here, of a preset and by transformers, the children know
    _cfg = Config(batch=_batch, crop=32, window=64, teacher="micro", student="micro", device="cpu")
    check.networks(_cfg, scenes.CLASSES, synthetic.draw(1, 64))
with tempfile.TemporaryDirectory() as _folder:
    models.save(models.build("micro", scenes.CLASSES), Path(_folder) / "model")


def _child(arguments: list[str], out: str, environment: dict[str, str]) -> None:
    gc.freeze()  # what was imported is not looked through whenever garbage is collected
    os.environ.update(environment)
    torch.set_num_threads(1)
    said = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    evaluate.images_per_second = partial(evaluate.images_per_second, seconds=0)
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    os._exit(code)


def start(arguments: list[str], out: Path, processes: int = 1) -> list[Any]:
    """`dsct-distill` with these arguments in one process or several; what they say goes to `out`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        environment = {k: str(v) for k, v in place.items()} if processes > 1 else {"OMP_NUM_THREADS": "1"}
        started.append(CONTEXT.Process(target=_child, args=(arguments, str(out), environment)))
        started[-1].start()
    return started


def finished(arguments: list[str], out: Path, processes: int = 1) -> None:
    """The same, waited for; all must go well."""
    started = start(arguments, out, processes)
    for process in started:
        process.join(120)
        if process.exitcode != 0:
            for other in started:
                other.kill()
        assert process.exitcode == 0, out.read_text()
