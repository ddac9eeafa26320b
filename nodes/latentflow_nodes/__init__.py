"""The model server: one process that loads one model and serves its role's calls over gRPC."""

import os

# Progress bars and advice of the loaders are for notebooks; a server's log has its own lines. Read when transformers is
# imported, so it stands before every import of it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Torch's idle threads spin by default. Servers that work at the same time (a denoiser and its ControlNets) would then take
# the cores from each other: a picture that takes 0.7 s took 25. Read when OpenMP is loaded, with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
