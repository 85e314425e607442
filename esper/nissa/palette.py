"""Colours of the pictures, safe for colour-blind eyes.

After Okabe and Ito, "Color Universal Design" (2008).
"""

from types import MappingProxyType

from esper.leyline.states import SeedState

TRAIN, DECISION, HOST, GROWN, INK, FAINT = "#56606B", "#0072B2", "#C9CED4", "#009E73", "#222222", "#8A9099"

STAGES = MappingProxyType(
    {
        SeedState.GERMINATED: "#C9CED4",
        SeedState.LOADING: "#C9CED4",
        SeedState.TRAINING: "#56B4E9",
        SeedState.GRAFTING: "#E69F00",
        SeedState.STABILIZATION: "#F0E442",
        SeedState.EVALUATING: "#CC79A7",
        SeedState.FINE_TUNING: "#0072B2",
        SeedState.FOSSILIZED: "#009E73",
        SeedState.CULLED: "#D55E00",
        SeedState.CANCELLED: "#8A9099",
        SeedState.ROLLED_BACK: "#000000",
    }
)
"""Colour of each state that a seed can be seen in."""
