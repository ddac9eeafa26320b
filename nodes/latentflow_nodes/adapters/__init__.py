"""LoRA adapters: file formats, layers, and merging."""
