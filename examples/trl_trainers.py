"""TRL's own GRPOTrainer and RLOOTrainer sample from an engine that borrows the model which they train."""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from penstock.demo import MODEL_DIR
from penstock.training.trl import generate_with

PROMPTS = Dataset.from_dict({"prompt": ["def add(a, b):\n", "class Point:\n", "import os\n", "for i in range(3):\n"]})
SIZES = {"max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 16}
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of different tokens."""
    return [len(set(ids)) / max(1, len(ids)) for ids in completion_ids]


def main() -> None:
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)):
        args = config_class(tempfile.mkdtemp(), bf16=False, use_cpu=True, learning_rate=1e-4, **SIZES, **QUIET)
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        trainer = trainer_class(model, reward, args=args, train_dataset=PROMPTS, processing_class=tokenizer)
        with generate_with(trainer) as engine:
            trainer.train()
            version = engine.weight_version
        logs = [log for log in trainer.state.log_history if "reward" in log]
        differences = [log.get("sampling/sampling_logp_difference/max", 0.0) for log in logs]  # RLOO has none
        print(f"{trainer_class.__name__}: {version} updates, log probabilities within {max(differences)}")


if __name__ == "__main__":
    main()
