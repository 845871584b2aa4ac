"""Other interfaces to the engine: `LLM` for scripts, vLLM's `AsyncLLMEngine`, and `PerformanceOptimizer`.

No facade schedules, samples or caches. Each creates the native engine and otherwise uses only `api`.
"""
