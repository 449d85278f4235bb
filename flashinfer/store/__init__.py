"""The weight store: its manifest, record geometry, writer, and `verify`. `docs/format.md` is the specification."""

from flashinfer.store.facts import Activation, Facts, Rope
from flashinfer.store.geometry import Geometry, choose_bundles_per_record
from flashinfer.store.manifest import FileEntry, Manifest, NeuronLayer, PartEntry, TensorEntry
from flashinfer.store.open import Store, open_store
from flashinfer.store.verify import Damage, verify
from flashinfer.store.writer import StoreWriter

__all__ = [
    "Activation",
    "Damage",
    "Facts",
    "FileEntry",
    "Geometry",
    "Manifest",
    "NeuronLayer",
    "PartEntry",
    "Rope",
    "Store",
    "StoreWriter",
    "TensorEntry",
    "choose_bundles_per_record",
    "open_store",
    "verify",
]
