"""Measurements: what the machine gives, and what the runtime makes of it. `flashinfer bench` shows them."""
