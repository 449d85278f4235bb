from __future__ import annotations

from pathlib import Path

import pytest

from flashinfer import pack
from tests.checkpoints import make_llama, make_opt
from tests.engine.variants import VARIANTS


class Packed:
    """A checkpoint and the store packed from it."""

    def __init__(self, checkpoint: Path, store: Path) -> None:
        self.checkpoint, self.store = checkpoint, store


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory):
    """`packed(variant, dtype)`: made once per session."""
    made: dict[tuple[str, str], Packed] = {}

    def get(variant: str, dtype: str = "float32") -> Packed:
        if (variant, dtype) not in made:
            family, overrides = VARIANTS[variant]
            root = tmp_path_factory.mktemp(variant)
            make = make_llama if family == "llama" else make_opt
            checkpoint = make(root / "checkpoint", dtype=dtype, max_position_embeddings=256, **overrides)
            pack(checkpoint, root / "store")
            made[variant, dtype] = Packed(checkpoint, root / "store")
        return made[variant, dtype]

    return get
