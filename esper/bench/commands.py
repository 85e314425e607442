"""`esper bench KIND`: growth, speed and stability, each measured by one command."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Final, NamedTuple

from esper.leyline.errors import ConfigError


class Kind(NamedTuple):
    """What can be benched.

    Args:
        module: has the function `command`, which takes the arguments and returns the exit status.
        about: what it tells, for people.
    """

    module: str
    about: str


KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "growth": Kind("esper.bench.growth_command", "does growth pay on an experiment, at equal training compute?"),
        "speed": Kind("esper.bench.speed.command", "what seeds, kernels and decisions cost, beside their targets"),
        "stability": Kind("esper.bench.stability.command", "what many grafts do to what the network knew"),
    }
)


def bench(args: Sequence[str]) -> int:
    """Run `esper bench KIND`.

    Raises:
        ConfigError: there is no such kind.
    """
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {kind:<10} {about.about}" for kind, about in KINDS.items())
        print(f"usage: esper bench KIND ...\n\n{lines}\n\n`esper bench KIND --help` tells more.")
        return 0
    if name not in KINDS:
        raise ConfigError(f"esper bench knows no {name!r}; the kinds are {', '.join(KINDS)}.")
    status: int = import_module(KINDS[name].module).command(list(args[1:]))
    return status
