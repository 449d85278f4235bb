"""The benchmark of bookkeeping on a device, with the CPU as one."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import gpu_slots
from flashinfer.backend import APART, open_backend

SMALL = ["--records", "300", "--layers", "2", "--tokens", "12"]


def test_both_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_slots.main(SMALL) == 0
    out = capsys.readouterr().out
    assert "the CPU, as a device; 2 layers of 300 records" in out
    assert "device: " in out
    assert "  host: " in out


def test_steps_that_are_counted() -> None:
    layers = gpu_slots.Layers(open_backend(APART, 1, "torch"), 2, 100, 25, 25)
    found = gpu_slots.run(layers, 100, 0.1, 13)
    assert {name: len(some) for name, some in found.items()} == {"device": 6, "host": 6}


def test_a_difference_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = gpu_slots.Layers(open_backend(APART, 1, "torch"), 1, 100, 25, 25)
    monkeypatch.setattr(layers, "on_host", lambda layer, flags: layers.host[layer].step(np.arange(3)))
    with pytest.raises(SystemExit, match="token 0, layer 0: device and host decide differently"):
        gpu_slots.run(layers, 100, 0.1, 13)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(SystemExit, match="are not counted; take more"):
        gpu_slots.main(["--tokens", "10"])
