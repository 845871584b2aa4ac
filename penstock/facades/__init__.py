"""The engine in other vocabularies: `LLM` for scripts, vLLM's `AsyncLLMEngine`, and `PerformanceOptimizer`.

Thin: no facade schedules, samples or caches. Each makes the native engine and is otherwise written against `api`.
"""
