"""Contenders of `caps.py`: a fresh process each, in a memory cgroup of its own; and what is made of their reports."""
