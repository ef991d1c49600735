"""torchvision: a DeepLabV3 of MobileNetV3 learns from an FCN of ResNet-50; their outputs are dicts, `out` and `aux`.

The lines are those marked `dsct`. `pip install torchvision`; python examples/torchvision_deeplab.py
"""

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50

from dsct_kernels import dsct_loss  # dsct

WEIGHTS = {"out": 1.0, "aux": 0.4}  # of the outputs; torchvision's own reference script has 1 and 0.5


def networks():
    torch.manual_seed(0)
    nothing = {"weights": None, "weights_backbone": None, "num_classes": 6, "aux_loss": True}
    return deeplabv3_mobilenet_v3_large(**nothing), fcn_resnet50(**nothing).eval()


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
            taught = teacher(images)["out"]  # one teacher for both of the student's heads
        outputs = student(images)
        losses = {name: dsct_loss(outputs[name], taught, labels) for name in WEIGHTS}  # dsct
        sum(WEIGHTS[name] * losses[name].total for name in WEIGHTS).backward()
        optimiser.step()
        optimiser.zero_grad()
        print({name: round(losses[name].total.item(), 4) for name in losses})
    return student


if __name__ == "__main__":
    main()
