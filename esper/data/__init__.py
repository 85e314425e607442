"""Data: modules that deliver three disjoint parts, for training, for deciding and for reporting."""

from esper.data.base import EsperDataModule, Parts
from esper.data.digits import Digits
from esper.data.loader import SeededLoader
from esper.data.ranks import RankSampler
from esper.data.samplers import ResumableSampler, SeededSampler, StepSampler
from esper.data.shapes import Shapes
from esper.data.spirals import Spirals
from esper.data.text import ByteText
from esper.data.tokens import TokenText
from esper.data.vision import CIFAR10, CIFAR100, MNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "ByteText",
    "Digits",
    "EsperDataModule",
    "Parts",
    "RankSampler",
    "ResumableSampler",
    "SeededLoader",
    "SeededSampler",
    "Shapes",
    "Spirals",
    "StepSampler",
    "TokenText",
]
