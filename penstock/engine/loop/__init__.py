"""The thread that steps the engine and the thread that runs the model."""
