"""Other engines behind the `Engine` protocol."""
