"""OpenAI's API around an engine: `uvicorn --app-dir examples openai_server:app`, then /v1/chat/completions."""

from penstock import InferenceEngine
from penstock.serving import ServingSettings
from penstock.serving import app as serving_app
from shutdown import closed_by_signals

engine = InferenceEngine()  # starts with the server
settings = ServingSettings(served_model_name=("demo", "gpt-4o-mini"))
app = serving_app(engine, settings, lifespan=lambda app: closed_by_signals(engine))
