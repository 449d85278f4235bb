"""The scoring of each layer, and ALiBi's slopes against those of transformers."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from flashinfer.model.scoring import alibi_slopes, scoring_of
from tests.store.test_facts import FACTS


@pytest.mark.parametrize("heads", [*range(1, 20), 32, 40, 71, 112])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    import torch

    biases = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    np.testing.assert_allclose(alibi_slopes(heads), biases[:, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 24, 56, 64])
@pytest.mark.parametrize("largest", [8, 16])
def test_slopes_are_those_of_mpt(heads: int, largest: int) -> None:
    biases = build_mpt_alibi_tensor(heads, 2, largest)
    np.testing.assert_allclose(alibi_slopes(heads, largest), -biases[:, 0, 0], rtol=1e-6)


def test_a_layer_has_what_the_facts_say() -> None:
    facts = msgspec.structs.replace(FACTS, window=8, global_layers=(1,), attention_softcap=50.0, sinks=True)
    sinks = np.arange(4, dtype=np.float32)
    local, everywhere = (scoring_of(facts, layer, sinks) for layer in (0, 1))
    assert (local.window, everywhere.window) == (8, None)
    assert local.softcap == everywhere.softcap == 50.0
    assert local.sinks is sinks
    assert local.slopes is None


def test_biases_that_are_scaled_like_products() -> None:
    facts = msgspec.structs.replace(FACTS, rope=None, alibi=8.0)
    scaled = msgspec.structs.replace(facts, alibi_scaled=True)
    plain = scoring_of(facts, 0).slopes
    assert plain is not None
    assert np.array_equal(plain, alibi_slopes(4))
    np.testing.assert_allclose(scoring_of(scaled, 0).slopes, plain / 2)  # heads of 4 values
    scaled = msgspec.structs.replace(scaled, attention_scale=0.1)
    np.testing.assert_allclose(scoring_of(scaled, 0).slopes, plain * 0.1, rtol=1e-6)
