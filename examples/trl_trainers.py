"""TRL's own GRPOTrainer and RLOOTrainer sample from an engine that borrows the model which they train."""

import argparse
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from penstock.demo import MODEL_DIR
from penstock.training.trl import generate_with

PROMPTS = Dataset.from_dict({"prompt": ["def add(a, b):\n", "class Point:\n", "import os\n", "for i in range(3):\n"]})
SIZES = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 16}
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
DIFFERENCE = "sampling/sampling_logp_difference/max"  # between engine and trainer, in the log of GRPOTrainer
KINDS = ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig))


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of different tokens."""
    return [len(set(ids)) / max(1, len(ids)) for ids in completion_ids]


def train(trainer_class: type, config_class: type, num_steps: int) -> tuple[list[float], list[float]]:
    """The mean reward of each step, and the largest difference of log probabilities, which RLOO does not report."""
    steps = {"max_steps": num_steps, "learning_rate": 1e-4}
    args = config_class(tempfile.mkdtemp(), bf16=False, use_cpu=True, **steps, **SIZES, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    trainer = trainer_class(model, reward, args=args, train_dataset=PROMPTS, processing_class=tokenizer)
    with generate_with(trainer) as engine:
        trainer.train()
        version = engine.weight_version
    logs = [log for log in trainer.state.log_history if "reward" in log]
    differences = [log[DIFFERENCE] for log in logs if DIFFERENCE in log]
    agreement = f"log probabilities within {max(differences)}" if differences else "TRL reports no differences"
    print(f"{trainer_class.__name__}: {version} updates, {agreement}")
    return [log["reward"] for log in logs], differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE", help="draw GRPO's reward and difference as a PNG file")
    options = parser.parse_args()
    curves = [train(*kind, options.steps) for kind in KINDS]
    if options.plot:
        import training_plot  # needs matplotlib

        label = "largest difference between engine and trainer"
        training_plot.save(options.plot, "TRL's GRPOTrainer", *curves[0], label)
