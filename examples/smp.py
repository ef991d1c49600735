"""segmentation_models_pytorch: a U-Net learns from an FPN; the encoders' stages are compared, too.

The lines are those marked `dsct`. `pip install segmentation-models-pytorch`; python examples/smp.py
"""

import segmentation_models_pytorch as models
import torch

from dsct_kernels import dsct_loss  # dsct


def networks():
    torch.manual_seed(0)
    settings = {"encoder_weights": None, "classes": 6, "encoder_depth": 5}
    student = models.Unet("resnet18", decoder_channels=(64, 32, 16, 8, 8), **settings)
    teacher = models.FPN("mobilenet_v2", decoder_pyramid_channels=32, decoder_segmentation_channels=32, **settings)
    return student, teacher.eval()


def forward(model, images):
    """What `model(images)` does, and the stages on the way (encoder, decoder and head are public in every model)."""
    stages = model.encoder(images)
    return model.segmentation_head(model.decoder(stages)), stages[2:]  # without the image and the stem


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
            taught, teacher_stages = forward(teacher, images)
        logits, stages = forward(student, images)
        losses = dsct_loss(logits, taught, labels, stages, teacher_stages)  # dsct
        losses.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        print({name: round(value.item(), 4) for name, value in losses._asdict().items()})
    return student


if __name__ == "__main__":
    main()
