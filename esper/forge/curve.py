"""The forge's key pair for workers of other machines."""

from esper.forge.link import Places
from esper.oona.keys import CurveKeys


def curve_keys(places: Places) -> CurveKeys:
    """Return the forge's pair for workers of other machines, made the first time."""
    file = places.keys / "curve"
    return CurveKeys.load(file if file.exists() else CurveKeys.generate().save(file))
