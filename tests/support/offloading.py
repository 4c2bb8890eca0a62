"""Offloading's hooks on a machine without a GPU: the CPU stands for it, and only streams, pinning and copies are pretended."""

from __future__ import annotations

import contextlib
from typing import Any

import accelerate.hooks
import torch
from diffusers.hooks import group_offloading
from torch import nn

CPU = torch.device("cpu")


class _Stream:
    def synchronize(self) -> None:
        pass


class _Accelerator:
    def stream(self, _: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self) -> _Stream:
        return _Stream()


def pretend_streams(monkeypatch: Any) -> None:
    """Groups of group offloading keep copies of their weights, as they do for ``use_stream=True``, and copy those back."""
    kind = group_offloading.ModuleGroup
    begin = kind.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs | {"stream": _Stream()})
        self._torch_accelerator_module = _Accelerator()

    @contextlib.contextmanager
    def pinned(self: Any) -> Any:
        yield dict(self.cpu_param_dict)

    def transfer(self: Any, tensor: torch.Tensor, source: torch.Tensor, *_: Any) -> None:
        tensor.data = source.clone()

    monkeypatch.setattr(kind, "__init__", made)
    if hasattr(kind, "_to_cpu"):
        monkeypatch.setattr(kind, "_to_cpu", staticmethod(lambda tensor, low: tensor.data if low else tensor.data.clone()))
    else:  # before diffusers 0.38
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(kind, "_pinned_memory_tensors", pinned)
    monkeypatch.setattr(kind, "_transfer_tensor_to_device", transfer)


def offload_in_groups(model: Any, kind: str, **options: Any) -> None:
    """Of ``block_level`` or ``leaf_level``, to a GPU where there is one."""
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    model.enable_group_offload(onload_device=device, offload_device=CPU, offload_type=kind, num_blocks_per_group=1, **options)


def pretend_accelerator(monkeypatch: Any) -> None:
    """``enable_sequential_cpu_offload(device="cpu")`` gives modules parameters, as for a GPU, and not plain tensors."""
    real = accelerate.hooks.set_module_tensor_to_device

    def place(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
        real(module, name, *args, **kwargs)
        path, _, last = name.rpartition(".")
        holder = module.get_submodule(path)
        placed: Any = holder._parameters.get(last)
        if type(placed) is torch.Tensor:
            holder._parameters[last] = nn.Parameter(placed, requires_grad=False)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", place)
