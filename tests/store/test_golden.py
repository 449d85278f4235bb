"""The writer, held to docs/format.md byte by byte. After a deliberate change of the format:

python -m tests.store.test_golden        # rewrites tests/store/golden/v3, to be looked at before it is committed
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from flashinfer import __distribution__, __version__
from flashinfer.pack import pack
from flashinfer.store import Manifest, open_store, verify
from tests.plain_checkpoint import LLAMA, OPT, write_checkpoint
from tests.store.predicted import add_predictors
from tests.store_contents import manifest_of

GOLDEN = Path(__file__).parent / "golden"
REVERSED = list(range(20, -1, -1))
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama-f32": (LLAMA, "f32", {}),
    "llama-bundled": (LLAMA, "bf16", {"decision": "bundled", "bundles_per_record": 3, "alignment": 1024}),
    "opt-f16": (OPT, "bf16", {"quant": "f16", "permutation": [REVERSED, REVERSED]}),
    "opt-bundled": (OPT, "f16", {"decision": "bundled"}),
}


PREDICTED = {"llama-predicted": "llama-bundled", "opt-predicted": "opt-bundled", "opt-low-rank": "opt-f16"}
"""Cases that have predictors and a calibration, each made from another case."""


def make(case: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Pack a case; the store, and its manifest with a fixed `generator`."""
    config, dtype, options = CASES[PREDICTED.get(case, case)]
    pack(write_checkpoint(folder / "checkpoint", config, dtypes=dtype), folder / "store", **options)
    if case in PREDICTED:
        add_predictors(open_store(folder / "store"))
    manifest = manifest_of(folder / "store")
    assert manifest["generator"] == f"{__distribution__} {__version__}"
    return folder / "store", manifest | {"generator": "golden"}


def assert_files(store: Path, golden: dict[str, Any]) -> None:
    """The files of a golden manifest, and nothing else, with its checksums."""
    files = [golden["dense"], golden["neurons"], *golden["text"].values(), *golden["sections"].values()]
    files += [golden["predictors"]] if golden.get("predictors") else []
    assert {p.name for p in store.iterdir()} == {f["name"] for f in files} | {"manifest.json", "lock"}
    for f in files:
        data = (store / f["name"]).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == f["xxh3"]
        assert len(data) == f["bytes"]
        assert f["xxh3"][:16] in f["name"]


@pytest.mark.parametrize("case", sorted([*CASES, *PREDICTED]))
def test_bytes_are_those_of_the_golden_manifest(case, tmp_path):
    store, manifest = make(case, tmp_path)
    golden = json.loads((GOLDEN / "v3" / f"{case}.json").read_text())
    assert manifest == golden
    assert_files(store, golden)


@pytest.mark.parametrize("case", sorted(CASES))
def test_version_1_is_still_read(case, tmp_path):
    """Its data files are those of version 3, its manifest is the one a program of then wrote: it was never changed."""
    store, new = make(case, tmp_path)
    text = (GOLDEN / "v1" / f"{case}.json").read_text()
    old = json.loads(text)
    assert (old["version"], old["neurons"], old["dense"]) == (1, new["neurons"], new["dense"])
    expected = {role: open_store(store).read_tensor(role) for role in new["tensors"]}
    (store / "manifest.json").write_text(text)
    assert_files(store, old)
    opened = open_store(store)
    assert opened.manifest.version == 1
    assert (opened.manifest.predictors, opened.calibration()) == (None, None)
    assert verify(opened) == []
    assert all(np.array_equal(opened.read_tensor(role), values) for role, values in expected.items())


@pytest.mark.parametrize("case", sorted([*CASES, *PREDICTED]))
def test_version_2_is_still_read(case, tmp_path):
    """Its files are those of version 3; what it calls int8 is int8g32."""
    store, new = make(case, tmp_path)
    text = (GOLDEN / "v2" / f"{case}.json").read_text()
    assert ('"int8"' in text) == ('"int8g32"' in json.dumps(new))
    expected = open_store(store)
    (store / "manifest.json").write_text(text)
    assert_files(store, json.loads(text))
    opened = open_store(store)
    assert opened.manifest == msgspec.structs.replace(expected.manifest, version=2, generator="golden")
    assert all(np.array_equal(opened.read_tensor(role), expected.read_tensor(role)) for role in new["tensors"])


def test_a_changed_store_has_the_version_of_who_changed_it(tmp_path):
    store, _ = make("opt-bundled", tmp_path)
    (store / "manifest.json").write_text((GOLDEN / "v1" / "opt-bundled.json").read_text())
    add_predictors(open_store(store))
    assert manifest_of(store) == json.loads((GOLDEN / "v3" / "opt-predicted.json").read_text())


def test_manifest_is_canonical_json(tmp_path):
    store, manifest = make("llama-predicted", tmp_path)
    for name in ("manifest.json", manifest["sections"]["calibration"]["name"]):
        text = (store / name).read_text()
        assert text == msgspec.json.format(text, indent=2) + "\n"
    fields = [f.name for f in msgspec.structs.fields(Manifest)]
    assert list(manifest) == [name for name in fields if name != "origins"]  # of quantised checkpoints alone


if __name__ == "__main__":
    (GOLDEN / "v3").mkdir(parents=True, exist_ok=True)
    for case in [*CASES, *PREDICTED]:
        with tempfile.TemporaryDirectory() as folder:
            golden = make(case, Path(folder))[1]
            (GOLDEN / "v3" / f"{case}.json").write_text(json.dumps(golden, indent=2) + "\n")
