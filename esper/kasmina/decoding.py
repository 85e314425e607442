"""Text generation with a key-value cache, and children that would not see all that they need."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.blueprints.ops import OPS
from esper.kasmina.graft import Graft
from esper.leyline.errors import ConfigError

_log = logging.getLogger(__name__)


def mixes_tokens(ir: Mapping[str, Any]) -> bool:
    """Return whether a child of this graph (as plain data) reads other tokens than the one it computes.

    Example:
        >>> mixes_tokens({"nodes": [{"id": "mix", "op": "attention"}]}), mixes_tokens({"nodes": [{"op": "linear"}]})
        (True, False)
    """
    return any(OPS[node["op"]].MIXES_TOKENS for node in ir.get("nodes", ()))


class DecodingGuard:
    """Keeps what a language model writes the same with and without a key-value cache.

    With a cache the model is shown the new token only. A child that works token by token does not mind; one that mixes
    tokens would see one token instead of the text, and the model would write something else without a word. So while
    such a child is about, `generation_config.use_cache` of the model is False, and a forward that continues from a
    filled cache is refused. Without such children nothing is touched.

    Args:
        host: the model; the modules in it that have a `generation_config` are the ones that write text.
    """

    def __init__(self, host: nn.Module) -> None:
        """Touch nothing yet."""
        self._host = host
        self._mixing: dict[str, Graft] = {}
        self._before: list[tuple[Any, Any]] = []
        self._handles: list[RemovableHandle] = []

    def add(self, seed_id: str, graft: Graft) -> None:
        """Note a child that mixes tokens; the first one closes the cache."""
        self._mixing[seed_id] = graft
        if self._handles:
            return
        for module in self._host.modules():
            config = getattr(module, "generation_config", None)
            if config is not None and hasattr(config, "use_cache"):
                self._before.append((config, config.use_cache))
                config.use_cache = False
                self._handles.append(module.register_forward_pre_hook(self._check, with_kwargs=True))
        if self._handles:
            _log.warning("%s mixes tokens; generate() runs without key-value cache from now on.", seed_id)

    def drop(self, seed_id: str) -> None:
        """Forget a child; with the last one the cache opens again."""
        if self._mixing.pop(seed_id, None) is not None and not self._mixing:
            self.release()

    def release(self) -> None:
        """Give the model its own settings back."""
        while self._handles:
            self._handles.pop().remove()
        while self._before:
            config, use_cache = self._before.pop()
            config.use_cache = use_cache

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training or torch.is_grad_enabled() or not _continues(module, args, kwargs):
            return
        at_work = [name for name, graft in self._mixing.items() if graft.live and graft.objective == "graft"]
        if at_work:
            raise ConfigError(
                f"the child at {at_work[0]} mixes tokens, but this forward is shown only those that are not in its "
                "key-value cache yet; call generate(..., use_cache=False), or the model without past_key_values."
            )


def _continues(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    past = given.get("past_key_values", kwargs.get("past_key_values"))
    length = getattr(past, "get_seq_length", None)
    return bool(length()) if callable(length) else bool(past)
