"""Checks of the model servers on a GPU: equality with plain diffusers, resuming, whole workflows, and times.

`python -m gpucheck` runs each check in a process of its own. Without a GPU it runs them small, on the CPU.
"""
