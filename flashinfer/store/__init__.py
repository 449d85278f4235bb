"""The weight store: its manifest, record geometry, writers, and `verify`. `docs/format.md` is the specification."""

from flashinfer.store.calibration import Approximate, Calibration, LayerStatistics, Level
from flashinfer.store.facts import Activation, Experts, Facts, Rope
from flashinfer.store.geometry import Geometry, choose_bundles_per_record
from flashinfer.store.manifest import FileEntry, Manifest, NeuronLayer, PartEntry, TensorEntry
from flashinfer.store.open import Store, open_store
from flashinfer.store.roles import use_order
from flashinfer.store.update import StoreUpdate
from flashinfer.store.verify import Damage, verify
from flashinfer.store.writer import StoreWriter

__all__ = [
    "Activation",
    "Approximate",
    "Calibration",
    "Damage",
    "Experts",
    "Facts",
    "FileEntry",
    "Geometry",
    "LayerStatistics",
    "Level",
    "Manifest",
    "NeuronLayer",
    "PartEntry",
    "Rope",
    "Store",
    "StoreUpdate",
    "StoreWriter",
    "TensorEntry",
    "choose_bundles_per_record",
    "open_store",
    "use_order",
    "verify",
]
