"""The decoder: one for every family, its weights behind `weights.Weights`."""
