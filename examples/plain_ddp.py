"""A loop of one's own: DDP or FSDP2, autocast, GradScaler, accumulation, activation checkpointing. `dsct`: our lines.

torchrun --nproc-per-node=2 examples/plain_ddp.py --fsdp --amp float16 --checkpoint    (or python, for one process)
"""

import contextlib
import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dsct_kernels import dsct_loss  # dsct


class Network(nn.Module):
    def __init__(self, width, stride, checkpoint=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 7, stride, 3), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.head, self.checkpoint = nn.Conv2d(width, 6, 1), checkpoint

    def forward(self, x):
        again = torch.utils.checkpoint.checkpoint
        x = again(self.encoder, x, use_reentrant=False) if self.checkpoint else self.encoder(x)
        return self.head(x), x


def main(fsdp=False, amp=None, checkpoint=False):
    torch.manual_seed(0)
    student, teacher = Network(8, 4, checkpoint), Network(16, 2)
    model = fully_shard(student) if fsdp else DistributedDataParallel(student)
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=amp == "float16")
    for i in range(4):  # the micro-batches of one step
        torch.manual_seed(8 * dist.get_rank() + i)
        images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 6, (2, 64, 64), dtype=torch.uint8)
        labels[:, :5] = 255  # no label there
        if fsdp:
            model.set_requires_gradient_sync(i == 3)
        with contextlib.nullcontext() if fsdp or i == 3 else model.no_sync():
            with torch.autocast("cpu", getattr(torch, amp or "bfloat16"), enabled=amp is not None):
                logits, features = model(images)
                with torch.no_grad():
                    taught, teacher_features = teacher(images)
                losses = dsct_loss(logits, taught, labels, features, teacher_features)  # dsct
            scaler.scale(losses.total / 4).backward()
    scaler.step(optimiser)
    scaler.update()
    print({name: round(value.item(), 4) for name, value in losses._asdict().items()})
    return student


if __name__ == "__main__":
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    amp = next((dtype for dtype in ("bfloat16", "float16") if dtype in sys.argv), None)
    main("--fsdp" in sys.argv, amp, "--checkpoint" in sys.argv)
