"""Tensors between servers: encoding, holding, and moving them."""
