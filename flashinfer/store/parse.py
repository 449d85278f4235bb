"""From the bytes of a manifest to a checked `Manifest`, whoever wrote them, and in which version."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from flashinfer.errors import StoreError
from flashinfer.store.check import check_manifest
from flashinfer.store.manifest import FORMAT, VERSION, Manifest


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check a manifest; `where` names its file in errors.

    Codecs have the names of this version, whatever that of the manifest, which is kept.

    Raises:
        StoreError: not a manifest, of a newer version, an unknown key, or inconsistent.
    """
    try:
        head = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise StoreError(f"{where} is not valid JSON ({e}); the store is damaged: pack it again") from e
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{where} is not the manifest of a weight store (format {FORMAT!r} expected)")
    version = head.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"{where} has version {version!r}, a positive integer was expected; pack it again")
    if version > VERSION:
        raise StoreError(
            f"{where} has store version {version}; this program reads up to {VERSION}: upgrade flashinfer-offload"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise StoreError(f"{where}: {e}; the store is damaged or hand-edited: pack it again") from e
    if version < 3:
        manifest = _with_codec_names_of_3(manifest)
    check_manifest(manifest, where)
    return manifest


def _with_codec_names_of_3(m: Manifest) -> Manifest:
    """What is `int8g32` from version 3 on was called `int8` before; only predictors had it."""
    renamed = {role: replace(t, codec="int8g32") for role, t in m.tensors.items() if t.codec == "int8"}
    return replace(m, tensors=m.tensors | renamed)
