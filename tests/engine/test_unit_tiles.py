"""Tiles that cross no expert."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.config import TILE_NEURONS
from flashinfer.model.weights import decode_tiles, unit_tiles


@given(st.integers(1, 200), st.integers(1, 900), st.data())
def test_each_neuron_once_and_no_tile_across(unit: int, neurons: int, data: st.DataObject) -> None:
    count = -(-neurons // unit)
    units = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), dtype=np.int64)
    tiles = unit_tiles(units, unit, neurons)
    there = tiles[tiles >= 0]
    assert there.tolist() == [n for n in range(neurons) if n // unit in set(units.tolist())]
    for tile in tiles:
        found = tile[tile >= 0]
        assert len(found)
        assert found.tolist() == list(range(found[0], found[0] + len(found)))
        assert (tile[: len(found)] >= 0).all()
        assert len(set((found // unit).tolist())) == 1
        assert found[0] % unit % TILE_NEURONS == 0


@given(st.integers(1, 900))
def test_of_a_dense_layer_all_neurons_in_order(neurons: int) -> None:
    assert np.array_equal(unit_tiles(np.arange(1), neurons, neurons), decode_tiles(np.arange(neurons)))
