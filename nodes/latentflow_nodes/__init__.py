"""The model server: one process that loads one model and serves its role's calls over gRPC."""

import os

# Progress bars and advice of the loaders are for notebooks; a server's log has its own lines. Read when transformers is
# imported, so it stands before every import of it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
