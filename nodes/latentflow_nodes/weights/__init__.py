"""Weights: where they come from, and whether their files may be loaded."""
