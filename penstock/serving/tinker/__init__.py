"""A service for the Tinker SDK over one engine: trains LoRA adapters and samples from them."""

from penstock.serving.tinker.service import TinkerService
from penstock.serving.tinker.settings import TinkerSettings

__all__ = ["TinkerService", "TinkerSettings"]
