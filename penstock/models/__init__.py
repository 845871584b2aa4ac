"""What runs the model: loading, the executor (plan to tensors to logits to tokens), attention, sampler, `ScriptedModel`."""
