"""A small Llama-shaped model of Python source, and a draft model for it, so that Penstock runs offline at once.

Both were trained by `scripts/train_demo_model.py` on the sources of the Python standard library; README.md
beside this file is the model card. `DRAFT_DIR` holds no tokenizer: the draft shares the one in `MODEL_DIR`.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
DRAFT_DIR = Path(__file__).resolve().parent / "draft"
