"""The step engine: what runs a model's forward passes. Imports neither gRPC nor the wire."""
