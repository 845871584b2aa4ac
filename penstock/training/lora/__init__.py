"""LoRA adapters that are trained beside a frozen base module: parameters, losses, optimizer, files."""
