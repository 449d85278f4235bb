"""`flashinfer doctor`: is this machine, and the place of a store, fit to run from flash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

SCHEMA_VERSION = 1
"""Of the object `--json` prints."""


def command(
    path: Annotated[Path | None, typer.Argument(help="A store, or where one is to lie.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine and at the place of a store: what is well, and what to do about the rest."""
    from dataclasses import asdict

    from flashinfer.bench.checkup import examine

    checks = []
    for found in examine(path):
        checks.append(found)
        if not as_json:
            advice = f" -> {found.advice}" if found.advice else ""
            print(f"{found.status:<4} {found.name:<14} {found.text}{advice}")
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "checks": [asdict(c) for c in checks]}))
