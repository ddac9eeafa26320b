"""LoRA adapters: file formats, layers, merging, and applying them by row."""
