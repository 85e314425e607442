"""Graph networks of PyTorch Geometric: features [N, F], one row per node."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv

from tests.compat.case import Batch, Case, draws

NODES, FEATURES, CLASSES = 12, 6, 3


class GCN(nn.Module):
    """Two graph convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(FEATURES, 8), GCNConv(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, edges)), edges)


def _graph(seed: int) -> Batch:
    around = torch.arange(NODES)
    edges = torch.stack([torch.cat([around, around]), torch.cat([(around + 1) % NODES, (around + 3) % NODES])])
    return Batch((torch.randn(NODES, FEATURES, generator=draws(seed)), edges), around % CLASSES)


def _loss(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch.target)


CASES = (
    Case("PyG GCN", GCN, _graph, _loss),
    Case("PyG GCN, whole convolutions", GCN, _graph, _loss, ("first", "second")),
)
