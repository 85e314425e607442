"""Image models of timm, tiny and random. Run in a process of its own: `tests/compat/vision.lock` says why."""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torchvision's compiled operators do not load beside a CPU build of torch. Nothing here calls them, but importing it
# registers kernels for these two, so they must be declared.
_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402

from tests.compat.case import Batch, Case, draws  # noqa: E402
from tests.compat.table import row  # noqa: E402

CLASSES = 3


def resnet() -> nn.Module:
    """One basic block in each of four stages; batch normalisation, in-place ReLU."""
    return timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(6, 6, 8, 8))


def convnext() -> nn.Module:
    """One block in each of four stages; depthwise convolutions, layers on channels-last images, 2-d layer norm."""
    return timm.models.ConvNeXt(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(6, 6, 8, 8))


def vit() -> nn.Module:
    """Two blocks over 4 x 4 patches."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=12, depth=2, num_heads=2
    )


def _images(seed: int) -> Batch:
    return Batch(torch.randn(4, 3, 32, 32, generator=draws(seed)), torch.arange(4) % CLASSES)


def _loss(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch.target)


CASES = (
    Case("timm ResNet", resnet, _images, _loss, blueprint="BP-CONV-RES"),
    Case("timm ConvNeXt", convnext, _images, _loss, blueprint="BP-CONV-RES"),
    Case("timm ViT", vit, _images, _loss),
)


def main() -> None:
    """Print the rows as one line of JSON."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(case, Path(folder)))
    sys.stdout.write("\n" + json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
