"""The HTTP server: OpenAI's and Anthropic's APIs over any engine of `penstock.api`, as an ASGI application.

Needs `pip install 'penstock[serve]'`. Translates requests and answers; all scheduling, sampling and text handling is
the engine's. `app(engine)` makes the application; `ServingSettings` are its settings.
"""

from penstock.serving.application import app
from penstock.serving.settings import ApiKey, ServingSettings

__all__ = ["ApiKey", "ServingSettings", "app"]
