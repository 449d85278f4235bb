"""The families that run, and how far their logits are from transformers': `docs/families.md`.

    python benchmarks/families.py > docs/families.md

Every case of `tests/families.py` is written by transformers, packed, and run at the floor: the same comparison as
`tests/engine/test_families.py`, whose limit is 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from flashinfer import pack
from flashinfer.backend import open_backend
from flashinfer.config import Cap
from flashinfer.engine import Model
from flashinfer.errors import CapTooSmallError
from flashinfer.store import Facts
from tests.families import CASES, make, reference

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 89, 40)]
INTRO = """# Families

Made by `benchmarks/families.py`; not to be edited. Each line is a tiny random checkpoint (3 layers, hidden 40, FFN 107,
4 heads) that transformers {version} wrote from the config in `tests/families.py`, run on {backend} in float32 with the
least memory it can run in. The difference is the largest of all logits of a prompt of 40 tokens, at once and token by
token, from transformers' own; `scale` is the standard deviation of those logits. What the activation is depends on the
checkpoint: families are listed with that of the case. Some sizes differ (FFN 160 in mpt and bloom, which fix it). Four
cases are of models that transformers does not have (llama with fatrelu and shifted_relu, minicpm, bamboo): their
checkpoint is that of a llama or mistral with another config.json, and they are compared with that llama or mistral,
into which their scales and activation were put by hand. gemma3-with-pictures is the text model of one that also sees.

What streams at the floor: of a sparse model the neurons that fire, of a dense one all neurons; in both all matrices of
attention and head, and of a sparse model the one that decides who fires. Of a mixture of experts the neurons of those
that a token gets, and all of layers that have none; and routers.

| case | layout | activation | neurons | streams | largest difference | scale |
| --- | --- | --- | --- | --- | --- | --- |"""


def difference(case: str, checkpoint: Path, store: Path) -> tuple[float, float, Facts, str]:
    """Largest difference of logits at the floor, the standard deviation of transformers', the facts, the backend."""
    import torch

    with torch.no_grad():
        expected = reference(case, checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
    try:
        Model.open(store, Cap(weight_memory=1))
        raise AssertionError("one byte is below every floor")
    except CapTooSmallError as e:
        floor = e.floor
    with Model.open(store, Cap(weight_memory=floor)) as model:
        assert not model.plan.resident
        session = model.session()
        steps = np.stack([model.step(session, [t]) for t in PROMPT])
        both = [model.logits(model.session(), PROMPT), steps]
        largest = max(float(np.abs(found - expected).max()) for found in both)
        return largest, float(expected.std()), model.facts, open_backend("cpu", 1, "auto").name


def line(case: str, folder: Path) -> tuple[str, str]:
    """A line of the table, and the backend it was measured on."""
    pack(make(case, folder / "checkpoint"), folder / "store")
    largest, scale, f, backend = difference(case, folder / "checkpoint", folder / "store")
    kind = f"{f.activation}, gated" if f.gated else f.activation
    neurons, streams = ("sparse", "those that fire") if f.sparse else ("dense", "all")
    if f.experts is not None:
        shared = " and the shared" if f.experts.shared_size else ""
        neurons, streams = f"{f.experts.count} experts", f"the {f.experts.per_token} chosen{shared}"
    cells = (case, f"`{f.family}`", kind, neurons, streams, f"{largest:.1e}", f"{scale:.2f}")
    return f"| {' | '.join(cells)} |", backend


def main() -> None:
    import transformers

    lines, backend = [], ""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            text, backend = line(case, Path(folder))
        lines.append(text)
        print(text, file=sys.stderr)
    print(INTRO.format(version=transformers.__version__, backend=backend))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
