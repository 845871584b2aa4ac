"""What runs the model: loading, executor, attention, sampler, `ScriptedModel`. Importing it is light."""
