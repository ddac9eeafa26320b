"""The stubs generated from `protos/latentflow/v1` by `make proto`."""
