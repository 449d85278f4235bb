"""Layouts: which checkpoint tensor plays which role in a model family. Families are data (`layouts/*.toml`)."""

from flashinfer.layout.match import Match, find_layout, match_layout, views_of
from flashinfer.layout.read import known_layouts, read_layout
from flashinfer.layout.schema import Layout

__all__ = ["Layout", "Match", "find_layout", "known_layouts", "match_layout", "read_layout", "views_of"]
