import pytest
import torch

from esper.kasmina import telemetry
from esper.kasmina.readings import Readings, digest, summed_up
from esper.kasmina.spectrum import effective_ranks, growth_potentials
from esper.kasmina.steps import drain_health
from tests.kasmina.conftest import Rig, batch, counts, mlp


def activations(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (i + 1) for i in range(count)]


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_readings_put_together_are_those_taken_one_by_one(count, chunks):
    together, ys = Readings(chunks), activations(count, (16, 8))
    for y in ys:
        kept = together.read_activation(y, -1, fully=True)
        together.read_gradient(y.cos(), -1, kept)
        digest([together])
        kept = [value for value in vars(together).values() if isinstance(value, list)]
        assert max(map(len, kept)) <= 8, "what is kept stays bounded"
    one_by_one = sum(telemetry.chunk_statistics(telemetry.sampled_rows(y, -1), chunks) for y in ys)
    norms = torch.stack([telemetry.chunk_gradient_norms(y.cos(), -1, chunks) for y in ys])
    ranks = sum(effective_ranks(y[None], chunks) for y in ys) / count
    growth = sum(growth_potentials(y[None], y.cos()[None], chunks, len(y)) for y in ys) / count
    found = summed_up([together])
    torch.testing.assert_close(torch.stack([found[name][0] for name in telemetry.FORWARD_METRICS], -1), one_by_one)
    torch.testing.assert_close(found["gradient_norm"][0], norms.sum(0))
    torch.testing.assert_close(found["gradient_norm_variance"][0], norms.var(0, correction=0))
    torch.testing.assert_close(found["effective_rank"], ranks)
    torch.testing.assert_close(found["growth_potential"], growth.sqrt())
    assert summed_up([together]) == {}


def test_layers_of_all_shapes_are_digested_at_once_and_kept_apart():
    shapes = [(16, 8), (16, 8), (5, 8), (16, 4)] * 5
    layers = [Readings(2 if i % 3 else 1) for i in range(len(shapes))]
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        layer.read_activation(activations(1, shape, seed=i)[0], -1)
    digest(layers)
    for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        (y,) = activations(1, shape, seed=i)
        assert layer.kept == []
        torch.testing.assert_close(layer.statistics, [telemetry.chunk_statistics(y, layer.chunks)])


def test_what_was_read_outlives_a_change_in_place():
    readings, y = Readings(1), torch.randn(6, 4)
    expected = telemetry.chunk_statistics(y, 1)
    readings.read_activation(y, -1)
    y.relu_()
    digest([readings])
    torch.testing.assert_close(readings.statistics, [expected])


def test_a_layer_does_not_keep_more_than_it_must():
    rig = Rig(mlp(), batch(), config={"telemetry_every": 1})
    for step in range(50):
        rig.stepper.begin(step)
        rig.forward_backward()
        readings = rig.bank.layer("2").readings
        assert len(readings.kept) <= 1 and len(readings.statistics) < 8
    assert counts(rig.bank.layer("2")) == (50, 50, 0)
    assert torch.isfinite(drain_health([rig.bank.layer("2")])[0][0, :-1]).all()


def test_an_empty_batch_tells_nothing_and_breaks_nothing():
    rig = Rig(mlp(), batch())
    rig.stepper.begin(0)
    rig.model(batch()[:0]).sum().backward()
    assert counts(rig.bank.layer("2")) == (0, 0, 0)
    rig.model(batch()).sum().backward()
    assert counts(rig.bank.layer("2")) == (1, 1, 0)


@pytest.mark.parametrize("chunks", [1, 2])
def test_nothing_that_is_kept_holds_a_graph(chunks):
    rig = Rig(mlp(), batch(), config={"seeds_per_layer": chunks})
    rig.stepper.begin(0)
    torch.autograd.grad(rig.model(batch()).square().sum(), rig.model.host[0].weight, create_graph=True)
    readings = rig.bank.layer("2").readings
    rows, grads, *_ = readings.kept[0]
    assert not any(t.requires_grad for t in (rows, grads, *readings.norms))
