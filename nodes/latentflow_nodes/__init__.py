"""The model server: one process that loads one model and serves its role's calls over gRPC."""

import os

# Progress bars and advice of the loaders are for notebooks; a server's log has its own lines. Read when transformers is
# imported, so it stands before every import of it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# How long torch's threads spin before they sleep: long enough for the next parallel region of a forward pass, short
# enough to leave the cores to the next server. Read when OpenMP is loaded, with torch. See docs/decisions/0004.
