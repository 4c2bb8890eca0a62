"""A module with one of everything that a model has: common layers, a parameter and buffers of its own."""

from __future__ import annotations

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4, **kwargs), nn.LayerNorm(4), nn.Conv2d(1, 2, 3), nn.Embedding(5, 6))
        self.scalar = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("made", torch.arange(4.0), persistent=False)
