"""Run a transformers model with `PerformanceOptimizer` at each optimization level."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock import OptimizationConfig, OptimizationLevel, PerformanceOptimizer
from penstock.demo import MODEL_DIR


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    input_ids = tokenizer("def mean(values):\n", return_tensors="pt").input_ids

    for level in OptimizationLevel:
        optimizer = PerformanceOptimizer(model, OptimizationConfig(level=level))
        optimizer.optimized_generate(input_ids, max_length=8)  # warm-up
        output, stats = optimizer.optimized_generate(input_ids, max_length=64, temperature=0.7, seed=1)
        print(f"{level}: {stats['strategy']}, {stats['tokens_per_second']:.0f} tokens/s")
        if level is OptimizationLevel.BASIC:
            print(tokenizer.decode(output[0]))
            print(optimizer.describe())
        optimizer.stop()


if __name__ == "__main__":
    main()
