import os
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from esper.leyline.errors import ConfigError, OutputError
from esper.nissa.loggers import csv_logger, has_wandb_key, tensorboard_logger, wandb_logger


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_online_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="WANDB_API_KEY or run `wandb login`; or leave online=False"):
        wandb_logger(online=True, save_dir=str(tmp_path))


def test_offline_is_the_default_and_needs_no_key(tmp_path: Path) -> None:
    logger = wandb_logger(project="p", save_dir=str(tmp_path / "logs"))
    assert logger._offline and logger._wandb_init["mode"] == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert (tmp_path / "logs").is_dir()


def test_a_key_is_found_in_the_environment_and_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / "netrc").chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()
    assert wandb_logger(online=True, save_dir=str(tmp_path))._wandb_init["mode"] == "online"


def test_a_damaged_netrc_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine")
    assert not has_wandb_key()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        wandb_logger(save_dir=str(tmp_path / "file" / "logs"))


def test_the_plain_loggers(tmp_path: Path) -> None:
    assert isinstance(csv_logger(save_dir=str(tmp_path)), CSVLogger)
    assert isinstance(tensorboard_logger(save_dir=str(tmp_path)), TensorBoardLogger)
