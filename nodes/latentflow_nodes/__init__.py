"""The model server: one process that loads one model and serves its role's calls over gRPC."""
