"""The few hot operations, each a pure function: `reference` in plain torch is the oracle and always available."""
