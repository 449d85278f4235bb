from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.config import DiskCurve
from flashinfer.store.geometry import Geometry, choose_bundles_per_record, expected_seconds, round_up


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, list[int]]:
    """A geometry, and the original neuron at each position."""
    neurons, per = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    order = draw(st.permutations(range(neurons)))
    permuted = draw(st.booleans())
    position_of = np.argsort(order) if permuted else None
    geometry = Geometry(neurons, per, 512, 512 // per, 0, position_of)
    return geometry, list(order) if permuted else list(range(neurons))


@given(geometries(), st.data())
def test_records_hold_exactly_the_neurons_asked(made, data):
    geometry, order = made
    asked = data.draw(st.sets(st.integers(0, geometry.neurons - 1)))
    neurons = np.array(sorted(asked), dtype=np.int64)
    expected = {position // geometry.bundles_per_record for position, n in enumerate(order) if n in asked}
    records = geometry.records_of(neurons)
    assert records.tolist() == sorted(expected)
    assert [order[p] for p in geometry.positions(neurons)] == neurons.tolist()
    assert geometry.records == len({p // geometry.bundles_per_record for p in range(geometry.neurons)})


@given(st.integers(0, 10**12), st.sampled_from([512, 1024, 2048, 4096]))
def test_round_up(n, unit):
    assert round_up(n, unit) % unit == 0
    assert 0 <= round_up(n, unit) - n < unit


@given(
    st.integers(16, 100_000), st.integers(1, 30_000), st.sampled_from([512, 4096]), st.sampled_from([0.03, 0.1, 1.0])
)
def test_chosen_records_are_sane(bundle, neurons, alignment, density):
    count = choose_bundles_per_record(bundle, neurons=neurons, alignment=alignment, density=density)
    assert 1 <= count <= neurons
    assert count == 1 or count * bundle <= 16 * 1024


def test_a_large_bundle_gets_its_own_record():
    assert choose_bundles_per_record(16 * 1024, neurons=11008, alignment=512) == 1


def test_a_small_bundle_shares_a_record():
    assert choose_bundles_per_record(512, neurons=2048, alignment=4096) >= 8


@pytest.mark.parametrize("count", [1, 2, 4])
def test_denser_firing_never_reads_faster(count):
    times = [expected_seconds(4096, count, 512, d, DiskCurve()) for d in (0.01, 0.1, 0.5)]
    assert times == sorted(times)
