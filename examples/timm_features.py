"""timm: the stages of two backbones (`features_only=True`) go into the objective as they come, a CNN's and a Swin's.

The lines are those marked `dsct`. `pip install timm`; python examples/timm_features.py
"""

import timm
import torch
from torch import nn

from dsct_kernels import dsct_loss  # dsct


class Segmenter(nn.Module):
    """A backbone of timm and a head of one layer, at the resolution of its first stage."""

    def __init__(self, name, **settings):
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=False, features_only=True, **settings)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[0], 6, 1)

    def forward(self, x):
        stages = self.backbone(x)
        if self.backbone.output_fmt == "NHWC":  # Swin and its kind; from the shape alone nobody could tell
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]  # dsct: a view, read in place
        return self.head(stages[0]), stages


def networks():
    torch.manual_seed(0)
    student = Segmenter("resnet18", out_indices=(1, 2, 3, 4))
    tiny = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
    return student, Segmenter("swin_tiny_patch4_window7_224", img_size=64, **tiny).eval()


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        labels = torch.randint(0, 6, (2, 64, 64), generator=generator, dtype=torch.uint8)
        labels[:, :5] = 255
        yield torch.randn(2, 3, 64, 64, generator=generator), labels


def main():
    student, teacher = networks()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
    for images, labels in batches():
        with torch.no_grad():
            taught, teacher_stages = teacher(images)
        logits, stages = student(images)
        losses = dsct_loss(logits, taught, labels, stages, teacher_stages)  # dsct
        losses.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        print({name: round(value.item(), 4) for name, value in losses._asdict().items()})
    return student


if __name__ == "__main__":
    main()
