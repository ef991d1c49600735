"""mmsegmentation, mmrazor and whatever else is built on mmengine: the objective in its registry, made by a config.

The lines are those marked `dsct`. Where mmengine is not installed nothing is registered, and the class is a module
like any other. python examples/mmseg_loss.py
"""

import torch
from torch import nn

from dsct_kernels import DSCTLoss  # dsct

try:
    from mmengine.registry import MODELS
except ImportError:
    MODELS = None


class DSCTDistillLoss(DSCTLoss):  # dsct
    """With mmrazor's names: `preds_S` and `preds_T` are the logits of the two networks, `loss_weight` is a factor.

    Returns a dict for `parse_losses` of mmengine, which adds up every entry whose name contains "loss" and logs the
    others: the total is the one entry with that word. (Of `_asdict()` it would add up nothing.)
    """

    def __init__(self, loss_weight=1.0, **keywords):
        super().__init__(**keywords)
        self.loss_weight = loss_weight

    def forward(self, preds_S, preds_T, gt_sem_seg, features_S=None, features_T=None):
        if gt_sem_seg.dim() == 4:  # mmsegmentation stacks labels as (N, 1, H, W)
            gt_sem_seg = gt_sem_seg.squeeze(1)
        losses = super().forward(preds_S, preds_T, gt_sem_seg, features_S, features_T)
        parts = {name: part for name, part in losses._asdict().items() if name != "total"}
        return {"loss_dsct": self.loss_weight * losses.total, **parts}


if MODELS is not None:
    MODELS.register_module(module=DSCTDistillLoss)


def main():
    torch.manual_seed(0)
    student, teacher = (nn.Conv2d(3, 6, 7, stride, 3) for stride in (4, 2))
    config = {"type": "DSCTDistillLoss", "loss_weight": 0.5, "ignore_index": 255}
    criterion = MODELS.build(config) if MODELS else DSCTDistillLoss(loss_weight=0.5, ignore_index=255)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 6, (2, 1, 64, 64))
    labels[:, :, :5] = 255
    with torch.no_grad():
        taught = teacher(images)
    losses = criterion(student(images), taught, labels)
    losses["loss_dsct"].backward()  # mmengine: loss, log = model.parse_losses(losses)
    print({name: round(value.item(), 4) for name, value in losses.items()})
    return student, losses


if __name__ == "__main__":
    main()
