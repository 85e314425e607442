"""Models: the plain networks that Esper's own experiments grow; they know nothing of Esper."""

from esper.models.bytelm import ByteLM
from esper.models.cnn import SmallCNN
from esper.models.flops import macs, parameter_count
from esper.models.mlp import MLP
from esper.models.moe import MoEByteLM

__all__ = ["MLP", "ByteLM", "MoEByteLM", "SmallCNN", "macs", "parameter_count"]
