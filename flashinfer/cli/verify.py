"""`flashinfer verify`: every checksum of a weight store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    store: Annotated[Path, typer.Argument(help="Directory `flashinfer pack` made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every checksum of a weight store; name every damaged tensor, layer and file."""
    from flashinfer.cli.progress import byte_progress
    from flashinfer.errors import StoreError
    from flashinfer.store import open_store, verify
    from flashinfer.units import format_size

    opened = open_store(store)
    with byte_progress(f"verifying {store.name}") as progress:
        damages = verify(opened, progress)
    if as_json:
        damaged = [{"region": d.region, "file": d.file, "offset": d.offset, "length": d.length} for d in damages]
        print(json.dumps({"schema_version": 1, "path": str(store), "sound": not damages, "damaged": damaged}))
    elif not damages:
        files = opened.manifest.files()
        print(f"{store}: sound ({len(files)} files, {format_size(sum(f.bytes for f in files))})")
    else:
        for damage in damages:
            print(damage)
    if damages:
        more = f" and {len(damages) - 1} more" if len(damages) > 1 else ""
        raise StoreError(f"{store}: {damages[0]}{more}: pack the checkpoint again")
