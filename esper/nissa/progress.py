"""A progress bar that shows how growth is getting on."""

from collections import Counter
from typing import final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from esper.kasmina.bank import SeedBank
from esper.leyline.errors import ConfigError
from esper.leyline.states import SeedState
from esper.nissa.callback import find_tamiyo

Metrics = dict[str, int | str | float | dict[str, float]]


@final
class GrowthProgress(RichProgressBar):
    """Lightning's rich progress bar with the stages of the seeds and the mean alpha of those being blended in.

    Without a `Tamiyo` callback it is the plain bar.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Metrics:
        """Add `seeds` to what the bar shows."""
        metrics: Metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        tamiyo = find_tamiyo(trainer)
        if tamiyo is None:
            return metrics
        try:
            text = growth_text(tamiyo.bank)
        except ConfigError:  # Tamiyo is not attached yet.
            return metrics
        return metrics | {"seeds": text} if text else metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Leave out the number of epochs where there is none: Lightning would print `/-2`."""
        description: str = super()._get_train_description(current_epoch)
        return description.replace("/-2", "")


def growth_text(bank: SeedBank) -> str:
    """Return the stages of a model's seeds in a few words, e.g. `2 FOSSILIZED 1 GRAFTING α .35`; empty if none."""
    counts = Counter(bank.state(seed) for seed in bank.records)
    order = sorted(SeedState, key=lambda state: state is not SeedState.FOSSILIZED)
    words = [f"{counts[state]} {state}" for state in order if state is not SeedState.DORMANT and counts[state]]
    grafts = bank.grafted()
    alphas = [graft.strength for seed, graft in grafts.items() if bank.state(seed) is SeedState.GRAFTING]
    if alphas:
        words.append(f"α {sum(alphas) / len(alphas):.2f}".replace("0.", ".", 1))
    return " ".join(words)
