"""accelerate, as a run uses it: device, precision and processes, and a network under training in its hands."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import Config
from .files import DataError

WHOLE = sharded.StateDictOptions(full_state_dict=True)
WHOLE_ON_THE_FIRST = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def device_of(name: str) -> torch.device:
    """auto, cpu or cuda. Raises DataError for cuda where there is none."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise DataError("--device cuda: torch sees no CUDA device here")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def make_accelerator(cfg: Config) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin

    cuda = device_of(cfg.device).type == "cuda"
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    precision = cfg.precision if cfg.precision != "auto" else ("bf16" if cuda else "no")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads that a loaded model may not use
    plugin = None
    if cfg.parallel == "fsdp":
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise DataError("--parallel fsdp: expected several processes (torchrun --nproc-per-node=N), got one")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10**6, cpu_ram_efficient_loading=False
        )
    acc = Accelerator(
        cpu=not cuda,
        mixed_precision=precision,
        gradient_accumulation_steps=cfg.accumulate,
        fsdp_plugin=plugin,
        kwargs_handlers=[unused],
    )
    if plugin is not None:  # accelerate leaves CPUs out, torch's FSDP2 takes them as well
        acc.state.fsdp_plugin, acc.state.distributed_type = plugin, DistributedType.FSDP
    return acc


@contextmanager
def deterministic_or_refused(cfg: Config) -> Iterator[None]:
    """Around training: torch's error about an operation that --deterministic forbids, in the words of the command."""
    try:
        yield
    except RuntimeError as error:
        if cfg.deterministic and "deterministic" in str(error):
            raise DataError(f"--deterministic: {str(error).split('. ')[0]}") from error
        raise


def seed_everything(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)


class Training:
    """A network under training, as accelerate prepared it, with its optimiser and its running average."""

    def __init__(self, cfg: Config, acc: Any, model: nn.Module, lr: float):
        self.acc, self.decay = acc, cfg.ema
        self.average = AveragedModel(model, use_buffers=True) if cfg.ema else None
        self.unsharded = copy.deepcopy(model) if cfg.parallel == "fsdp" else None
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=cfg.weight_decay, fused=acc.device.type == "cuda"
        )
        if self.unsharded is not None:  # accelerate asks for those of a language model, transformers raises without any
            model.__dict__.update(get_input_embeddings=lambda: None, get_output_embeddings=lambda: None)
        self.model, self.optimizer = acc.prepare(model, optimizer)

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """Backward and, where `accumulate` says that the step is whole, the update at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.acc.backward(loss)
        if self.acc.sync_gradients:
            self.acc.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.acc.sync_gradients:
            n = int(self.average.n_averaged)  # young averages forget faster, else the first weights would never go
            self.average.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
            self.average.update_parameters(self.acc.unwrap_model(self.model))

    def plain(self) -> nn.Module:
        """The network to evaluate: the average, if there is one, without what surrounds it. Of all processes a call."""
        model: nn.Module = self.acc.unwrap_model(self.model)
        if self.average is not None:
            model = self.average.module
        elif self.unsharded is not None:
            self.unsharded.load_state_dict(sharded.get_model_state_dict(model, options=WHOLE))
            model = self.unsharded
        return model

    def finished(self) -> nn.Module:
        """The network as it was before it was prepared. accelerate's own undoing of mixed precision takes the
        decorators of transformers' forward with it, without which SegFormer hands its head no hidden states; so the
        class's forward is put back instead."""
        model = self.plain()
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        self.acc.free_memory()  # it holds on to what it prepared
        return model.eval()

    def state(self) -> dict[str, Any]:
        """All of it, on the first process; of all processes a call."""
        model, scaler = self.acc.unwrap_model(self.model), self.acc.scaler
        if self.unsharded is None:
            found = {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}
        else:
            both = sharded.get_state_dict(model, self.optimizer.optimizer, options=WHOLE_ON_THE_FIRST)
            found = dict(zip(("model", "optimizer"), both, strict=True))
        average = self.average.state_dict() if self.average is not None else None
        return {**found, "scaler": scaler.state_dict() if scaler else None, "average": average}

    def load(self, saved: dict[str, Any]) -> None:
        model = self.acc.unwrap_model(self.model)
        if self.unsharded is None:
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            both = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            sharded.set_state_dict(model, self.optimizer.optimizer, **both, options=WHOLE)
        if self.acc.scaler:
            self.acc.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
