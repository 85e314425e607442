"""Whether this machine may speak to Weights & Biases."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names of the public service; the older and the newer clients of W&B keep keys under different ones."""


def has_wandb_key() -> bool:
    """Return whether a key is at hand, in the environment or in a netrc file; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    named = os.environ.get("NETRC")
    places = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    own = urlsplit(os.environ.get("WANDB_BASE_URL") or "").netloc
    hosts = _HOSTS if own in ("", *_HOSTS) else (own,)
    return any(_knows(place, host) for place in places for host in hosts)


def _knows(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).hosts.get(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
