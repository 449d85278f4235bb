"""Synthetic checkpoints of given dimensions whose real forward pass shows planted FFN statistics."""
