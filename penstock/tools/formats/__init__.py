"""The formats in which models write tool calls, a module for each family of them."""
