"""LoRA adapters: read from a folder or a live module, and applied beside the model's own products."""
