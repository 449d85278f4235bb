"""Synthetic mixtures of experts whose real router shows planted locality, made tensor by tensor when they are read."""
