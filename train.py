"""Compose a run from `conf/` and start it: `python train.py +experiment=NAME [group=option] [key=value] [-m]`."""

import logging
import os
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from esper.console import message_of, plain_errors

log = logging.getLogger("esper")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> float | None:
    """Run one configuration; return its decision loss, which a sweeper may minimise."""
    # Torch and Lightning take seconds to import, which a mistyped option need not wait for.
    from esper.run import run

    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    try:
        return run(config).grown.decision_loss
    except Exception as error:
        # The other points of a sweep run on, so this one's end must not go unseen.
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            log.error("FAILED %s: %s", config["output_dir"], message_of(error) or repr(error))
        raise


if __name__ == "__main__":
    # Hydra would print errors in its own way and hide where they came from.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with plain_errors():
        main()
