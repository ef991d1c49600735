"""torchdistill: a registered criterion that takes the hooks' outputs from its dictionaries, and a config that names it.

The lines are those marked `dsct`. `pip install torchdistill`; python examples/torchdistill_config/run.py
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import register_mid_level_loss

from dsct_kernels import DSCTLoss  # dsct


@register_mid_level_loss(key="DSCT")
class DSCT(DSCTLoss):  # dsct: registered as it is, it would get torchdistill's dictionaries
    def __init__(self, logits=".", features=None, **keywords):
        super().__init__(**keywords)
        self.taps = [logits, *([features] if features else [])]

    def forward(self, student_io, teacher_io, targets):
        (student, *fs), (teacher, *ft) = ([io[tap]["output"] for tap in self.taps] for io in (student_io, teacher_io))
        return super().forward(student, teacher, targets, *fs, *ft).total


def network(width, stride):
    encoder = nn.Sequential(nn.Conv2d(3, width, 7, stride, 3), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(OrderedDict(encoder=encoder, classifier=nn.Conv2d(width, 6, 1)))


def samples(count=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 6, (count, 64, 64), generator=generator, dtype=torch.uint8)
    labels[:, :5] = 255
    return list(zip(torch.randn(count, 3, 64, 64, generator=generator), labels))


def main():
    torch.manual_seed(0)
    student, teacher = network(8, 4), network(16, 2)
    config = load_yaml_file(str(Path(__file__).with_name("dsct.yaml")))["train"]
    box = get_distillation_box(teacher, student, {"scenes": samples()}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    for images, labels in box.train_data_loader:
        loss = box.forward_process(images, labels)
        box.post_forward_process(loss)
        print(f"loss {loss.item():.4f}")
    return student


if __name__ == "__main__":
    main()
