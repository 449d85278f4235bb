"""The writer, held to docs/format.md byte by byte. After a deliberate change of the format:

python -m tests.store.test_golden        # rewrites tests/store/golden/, to be looked at before it is committed
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from flashinfer import __distribution__, __version__
from flashinfer.pack import pack
from flashinfer.store import Manifest
from tests.plain_checkpoint import LLAMA, OPT, write_checkpoint
from tests.store_contents import manifest_of

GOLDEN = Path(__file__).parent / "golden"
REVERSED = list(range(20, -1, -1))
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama-f32": (LLAMA, "f32", {}),
    "llama-bundled": (LLAMA, "bf16", {"decision": "bundled", "bundles_per_record": 3, "alignment": 1024}),
    "opt-f16": (OPT, "bf16", {"quant": "f16", "permutation": [REVERSED, REVERSED]}),
    "opt-bundled": (OPT, "f16", {"decision": "bundled"}),
}


def make(case: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Pack a case; the store, and its manifest with a fixed `generator`."""
    config, dtype, options = CASES[case]
    pack(write_checkpoint(folder / "checkpoint", config, dtypes=dtype), folder / "store", **options)
    manifest = manifest_of(folder / "store")
    assert manifest["generator"] == f"{__distribution__} {__version__}"
    return folder / "store", manifest | {"generator": "golden"}


@pytest.mark.parametrize("case", sorted(CASES))
def test_bytes_are_those_of_the_golden_manifest(case, tmp_path):
    store, manifest = make(case, tmp_path)
    golden = json.loads((GOLDEN / f"{case}.json").read_text())
    assert manifest == golden
    files = [golden["dense"], golden["neurons"], *golden["text"].values()]
    assert {p.name for p in store.iterdir()} == {f["name"] for f in files} | {"manifest.json", "lock"}
    for f in files:
        data = (store / f["name"]).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == f["xxh3"]
        assert len(data) == f["bytes"]
        assert f["xxh3"][:16] in f["name"]


def test_manifest_is_canonical_json(tmp_path):
    store, manifest = make("llama-f32", tmp_path)
    text = (store / "manifest.json").read_text()
    assert text == msgspec.json.format(text, indent=2) + "\n"
    assert list(manifest) == [f.name for f in msgspec.structs.fields(Manifest)]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            golden = make(case, Path(folder))[1]
            (GOLDEN / f"{case}.json").write_text(json.dumps(golden, indent=2) + "\n")
