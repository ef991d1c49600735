"""Lightning: the objective is a module of the LightningModule, its parts go to the log.

The lines are those marked `dsct`. `pip install lightning`; python examples/lightning_module.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from dsct_kernels import DSCTLoss  # dsct


def network(width, stride):
    layers = nn.Conv2d(3, width, 7, stride, 3), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(width, 6, 1))


class Distilling(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student, teacher = network(8, 4), network(16, 2)
        # In a list it is no submodule: not in the checkpoint, not among the parameters, not put to train mode.
        self.teacher = [teacher.requires_grad_(False).eval()]
        self.criterion = DSCTLoss()  # dsct

    def setup(self, stage):
        self.teacher[0].to(self.device)

    def training_step(self, batch, batch_index):
        images, labels = batch
        with torch.no_grad():
            taught = self.teacher[0](images)
        losses = self.criterion(self.student(images), taught, labels)  # dsct
        self.log_dict(losses._asdict(), batch_size=len(images))
        return losses.total

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def samples(count=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 6, (count, 64, 64), generator=generator, dtype=torch.uint8)  # as a PNG holds them
    labels[:, :5] = 255
    return list(zip(torch.randn(count, 3, 64, 64, generator=generator), labels))


def main(**settings):
    module = Distilling()
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(module, DataLoader(samples(), batch_size=2))
    print({name: round(value.item(), 4) for name, value in trainer.logged_metrics.items()})
    return module, trainer


if __name__ == "__main__":
    main()
