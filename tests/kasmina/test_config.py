import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.config import PRESETS, KasminaConfig
from esper.kasmina.strategies import STRATEGIES
from esper.leyline.errors import ConfigError


def test_the_default_is_what_was_measured():
    config = KasminaConfig()
    assert config == KasminaConfig(preset="measured")
    assert (config.training_steps, config.freeze_stabilization, config.freeze_fossils) == (0, False, False)


def test_strict_is_the_original_design():
    config = KasminaConfig(preset="strict")
    assert (config.training_objective, config.freeze_stabilization, config.freeze_fossils) == (
        "reconstruction",
        True,
        True,
    )
    assert min(config.training_steps, config.stabilization_steps, config.fine_tuning_steps) > 0


@given(preset=st.sampled_from(sorted(PRESETS)), ramp=st.integers(1, 500), chunks=st.integers(1, 9))
def test_a_preset_yields_to_what_is_given_and_survives_a_dump(preset, ramp, chunks):
    config = KasminaConfig.of({"preset": preset, "ramp_steps": ramp, "seeds_per_layer": chunks})
    assert (config.ramp_steps, config.seeds_per_layer) == (ramp, chunks)
    assert KasminaConfig.of(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({"ramp_step": 3}, "did you mean 'ramp_steps'"),
        ({"ramp_steps": 0}, "ramp_steps=0"),
        ({"seeds_per_layer": 0}, "seeds_per_layer=0"),
        ({"preset": "loose"}, "'measured' or 'strict'"),
        ({"strategy": "sudden"}, "fixed_ramp"),
        ({"reconstruction_noise": 1.0}, "reconstruction_noise"),
        ("strict", "not str"),
    ],
)
def test_wrong_settings_are_explained(given_, match):
    with pytest.raises(ConfigError, match=match):
        KasminaConfig.of(given_)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_configured(strategy):
    assert KasminaConfig(strategy=strategy).strategy == strategy
