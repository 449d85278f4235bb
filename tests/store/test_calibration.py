"""The calibration section: what cannot have been measured is refused, when it is read and when it is written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer.errors import StoreError, StoreReadError
from flashinfer.store import Store, StoreUpdate, open_store
from flashinfer.store.calibration import (
    HOTTEST,
    SHARES,
    UNIONS,
    WINDOWS,
    Calibration,
    decode_calibration,
    encode_calibration,
)
from tests.store.forging import Forge, put
from tests.store.predicted import calibration_for, statistics
from tests.store_contents import manifest_of


@pytest.fixture
def facts(store):
    return open_store(store).manifest.facts


def forged(change: Forge) -> bytes:
    data = json.loads(encode_calibration(calibration_for()))
    change(data)
    return json.dumps(data).encode()


def first_level(**values: Any) -> Forge:
    return lambda m: m["levels"][0].update(values)


def first_layer(**values: Any) -> Forge:
    return lambda m: m["statistics"]["exact"][0].update(values)


FORGED: dict[str, tuple[Forge, str]] = {
    "unknown key": (put("colour", "red"), "unknown field `colour`"),
    "unknown key in a level": (first_level(colour="red"), "unknown field `colour`"),
    "missing key": (lambda m: m.pop("tokens"), "missing required field `tokens`"),
    "wrong type": (put("tokens", "many"), "Expected `int`"),
    "no tokens": (put("tokens", 0), "0 tokens to fit"),
    "negative held out": (put("held_out", -1), "-1 held out"),
    "text checksum": (put("text_xxh3", "xyz"), "no checksum"),
    "unknown selection": (lambda m: m["statistics"].update(magic=[]), "magic"),
    "layers": (lambda m: m["statistics"]["exact"].pop(), "exact statistics of 1 layers, not 2"),
    "density": (first_layer(density=1.5, new=[1.5] + [0.0] * 16), "no share from 0 to 1"),
    "negative": (first_layer(hot=[-0.1] * 6), "exact statistics of layer 0: hot has a value that is no share"),
    "density of its own": (first_layer(density=0.5), "new begins with 0.25, the density is 0.5"),
    "short new": (first_layer(new=[0.25]), "new has 1 points, not 17"),
    "short union": (first_layer(union=[]), "union has 0 points, not 8"),
    "long missing": (first_layer(missing=[0.5] * 18), "missing has 18 points, not 17"),
    "hot": (first_layer(hot=[0.5] * 5), "hot has 5 points, not 6"),
    "unknown predictor": (first_level(predictor="oracle"), "oracle"),
    "exact is no approximation": (first_level(predictor="exact"), "exact"),
    "recall": (first_level(recall=1.01), "level 0: .*recall 1.01.* no share"),
    "target": (first_level(target=-1), "level 0: target -1"),
    "adjusted layers": (first_level(adjust=[0.0]), "level 0: adjusts 1 layers, not 2"),
    "perplexity": (first_level(perplexity=0.0), "level 0: perplexity 0.0"),
    "exact perplexity": (first_level(exact_perplexity=-3.0), "or -3.0 is no finite number"),
    "negative factor": (lambda m: m["levels"][2].update(adjust=[-1.0, 1.0]), "level 2: a factor on thresholds"),
    "choice beyond": (put("chosen/threshold", 3), "threshold chose level 3 of 3"),
    "choice before": (put("chosen/threshold", -1), "threshold chose level -1 of 3"),
    "another's choice": (put("chosen/threshold", 0), "level 0, which is another predictor's"),
}


@pytest.mark.parametrize("what", sorted(FORGED))
def test_forged(facts, what):
    change, message = FORGED[what]
    with pytest.raises(StoreError, match=message) as caught:
        decode_calibration(forged(change), facts, "the/file")
    assert str(caught.value).startswith("the/file: ")
    assert "run `flashinfer calibrate` again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' + b"[" * 100_000])
def test_what_is_none(facts, data):
    with pytest.raises(StoreError, match="the/file: "):
        decode_calibration(data, facts, "the/file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["recall", "density", "target", "perplexity", "exact_perplexity"])
def test_numbers_that_are_none_are_never_written(store, value, name):
    """JSON has no word for them, so they can only come from whoever measures."""
    c = calibration_for()
    level = msgspec.structs.replace(c.levels[0], **{name: value})
    with StoreUpdate(open_store(store)) as update:
        with pytest.raises(StoreError, match="level 0"):
            update.write_calibration(msgspec.structs.replace(c, levels=(level, *c.levels[1:])), update.store.manifest)
        assert update.entries == []


@pytest.mark.parametrize("name", ["density", "new", "union", "missing", "hot"])
def test_statistics_that_are_no_numbers_are_never_written(store, name):
    layer = statistics()
    old = getattr(layer, name)
    worse = float("nan") if name == "density" else (*old[:-1], float("nan"))
    broken = msgspec.structs.replace(layer, **{name: worse})
    with StoreUpdate(open_store(store)) as update, pytest.raises(StoreError, match="layer 1"):
        update.write_calibration(
            msgspec.structs.replace(calibration_for(), statistics={"exact": (layer, broken)}), update.store.manifest
        )


def calibrations() -> st.SearchStrategy[Calibration]:
    """Any calibration of a model of two layers that is consistent."""
    share = st.floats(0, 1)

    def shares(count: int) -> st.SearchStrategy[tuple[float, ...]]:
        return st.tuples(*[share] * count)

    layer = st.builds(
        lambda density, new, union, missing, hot: statistics(density).__class__(
            density, (density, *new), union, missing, hot
        ),
        share, shares(WINDOWS - 1), shares(UNIONS), shares(SHARES), shares(len(HOTTEST)),
    )  # fmt: skip
    return st.builds(
        lambda layers, tokens, levels: msgspec.structs.replace(
            calibration_for(), statistics={"certified": layers}, tokens=tokens, levels=levels, chosen={}
        ),
        st.tuples(layer, layer), st.integers(1, 10**9), st.sampled_from([(), calibration_for().levels]),
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calibrations())
def test_decode_is_the_inverse_of_encode(facts, calibration):
    assert decode_calibration(encode_calibration(calibration), facts, "c") == calibration


def test_a_store_without_one(store):
    assert open_store(store).calibration() is None


def test_a_store_with_one(calibrated):
    found = open_store(calibrated).calibration()
    assert found is not None
    assert msgspec.structs.replace(found, weights="") == calibration_for()


def test_a_damaged_one(calibrated):
    opened = open_store(calibrated)
    path = calibrated / manifest_of(calibrated)["sections"]["calibration"]["name"]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"tokens": 1000', b'"tokens": 1001'))
    with pytest.raises(StoreError, match=rf"{path.name} does not match its checksum; run `flashinfer calibrate` again"):
        opened.calibration()
    path.write_bytes(data[:-10])
    with pytest.raises(StoreReadError, match=path.name):
        opened.calibration()


def test_of_another_store(calibrated):
    """A calibration under a manifest of other weights, as if files had been mixed."""
    opened = open_store(calibrated)
    neurons = msgspec.structs.replace(opened.manifest.neurons, xxh3="1" * 32)
    mixed = Store(opened.root, msgspec.structs.replace(opened.manifest, neurons=neurons))
    with pytest.raises(StoreError, match=r"other weights.*flashinfer calibrate"):
        mixed.calibration()
