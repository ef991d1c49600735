"""accelerate, as a run uses it: device, precision and processes, and a network under training in its hands."""

from typing import Any

import torch
from torch import nn

from .config import Config
from .files import DataError


def make_accelerator(cfg: Config) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device == "cuda" and not cuda:
        raise DataError("--device cuda: torch sees no CUDA device here")
    precision = cfg.precision if cfg.precision != "auto" else ("bf16" if cuda else "no")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads that a loaded model may not use
    return Accelerator(cpu=not cuda, mixed_precision=precision, kwargs_handlers=[unused])


def seed_everything(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


class Training:
    """A network under training, as accelerate prepared it, and its optimiser."""

    def __init__(self, cfg: Config, acc: Any, model: nn.Module, lr: float):
        self.acc = acc
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=cfg.weight_decay, fused=acc.device.type == "cuda"
        )
        self.model, self.optimizer = acc.prepare(model, optimizer)

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """Backward and the update at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.acc.backward(loss)
        self.acc.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def plain(self) -> nn.Module:
        """The network without what surrounds it, to look at on the way."""
        model: nn.Module = self.acc.unwrap_model(self.model)
        return model

    def finished(self) -> nn.Module:
        """The network as it was before it was prepared. accelerate's own undoing of mixed precision takes the
        decorators of transformers' forward with it, without which SegFormer hands its head no hidden states; so the
        class's forward is put back instead."""
        model = self.plain()
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        return model.eval()

    def state(self) -> dict[str, Any]:
        scaler = self.acc.scaler
        return {
            "model": self.plain().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.plain().load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.acc.scaler:
            self.acc.scaler.load_state_dict(saved["scaler"])
