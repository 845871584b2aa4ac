"""Train the two small models that ship with Penstock on the sources of this Python's standard library.

The text is the standard library of the interpreter that runs the script (tests only where they are
short, tables of data left out). About 2 % of the files, picked by a hash of their path, are held out.
A byte-level BPE tokenizer is trained first, then a Llama-shaped model, then a draft model that
learns from the first one's predictions and serves speculative decoding.

    python scripts/train_demo_model.py                      # everything: about 100 minutes on 2 cores
    python scripts/train_demo_model.py --smoke              # the same path in a minute, into a temp folder
    python scripts/train_demo_model.py --stage draft        # only the draft, from finished main weights

Training is scheduled by time (--minutes), not by steps: warm-up, a long constant rate, a decay to zero.
Checkpoints go to --work; run the same command again to resume after an interruption. Ctrl-C (or SIGTERM) stops the
model in training early and exports the best weights so far. The last line printed is one JSON document.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import re
import shutil
import signal
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB, CONTEXT, SCORED, TOP_K = 4096, 2048, 1024, 8
SHARED = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "use_cache": False}
SHAPES = {
    "model": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "draft": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 2},
}
# From this share of the time on, windows of this many tokens: mostly short for speed, long at the end.
PHASES = ((0.0, 256), (0.4, 512), (0.78, CONTEXT))
# A newline and the indentation after it are one piece; brackets, dots and underscores never join a word, so
# that a prompt that ends in one of them is cut into tokens the way the training text was.
PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n *|\s+(?!\S)|\s+"
SKIPPED = re.compile(r"(^|/)(site-packages|dist-packages|pydoc_data|__pycache__|config-[^/]*)/|_sysconfigdata[^/]*$")
TESTS = re.compile(r"(^|/)(test|tests|idle_test)/")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ("{doc}", "Write the function {name}.", "Write a Python function {name}. {doc}", "{name}: {doc}")


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def is_suitable(name: str, size: int) -> bool:
    """Whether a file is suitable: not a long test, a code page or a third-party package."""
    limit = 32_000 if TESTS.search(name) else 20_000 if "encodings/" in name else 400_000
    return not SKIPPED.search(name) and 200 < size <= limit


def looks_like_data(text: str) -> bool:
    """Whether a text is mostly tables of numbers or escapes."""
    letters = sum(char.isalpha() or char.isspace() for char in text)
    return letters < 0.62 * len(text) or text.count("\\x") + text.count("0x") > len(text) / 60


def read_corpus(limit: int | None) -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out, without duplicates, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    entries = [(path.relative_to(root).as_posix(), path) for path in sorted(root.rglob("*.py"))]
    train, held_out, digests = [], [], set()
    for name, path in [(name, path) for name, path in entries if is_suitable(name, path.stat().st_size)][:limit]:
        text = path.read_text("utf-8", errors="replace").replace("\r\n", "\n").expandtabs(8)
        key = digest("".join(text.split()))
        if key not in digests and not looks_like_data(text):
            digests.add(key)
            (train if digest(name) % 50 else held_out).append(text)
    return train, held_out


def chat_examples(text: str) -> Iterator[str]:
    """Short documented functions of one file as chat turns: the docstring is the question, the source the answer."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        doc = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        source = doc and textwrap.dedent(" " * node.col_offset + (ast.get_source_segment(text, node) or ""))
        if source and 80 < len(source) < 1500 and not node.name.startswith("test"):
            number = digest(source)
            question = QUESTIONS[number % 4].format(name=node.name, doc=doc.split("\n\n")[0].replace("\n", " "))
            system = f"{IM_START}system\nYou write Python.{IM_END}\n" if number % 5 == 0 else ""
            yield f"{system}{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{source}{IM_END}\n"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    parts = pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(list(parts)), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(SPECIALS), "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, **options))
    entries = {"bos_token": END, "eos_token": END, "pad_token": END, "additional_special_tokens": [IM_START, IM_END]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **entries)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def cut(text: str, rng: random.Random, every: int = 300) -> list[str]:
    """Split a text at random places, so that the model also sees prompts that end inside a word or a line."""
    marks = sorted(rng.randrange(len(text)) for _ in range(len(text) // every))
    return [text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random | None = None) -> torch.Tensor:
    """All texts as one row of ids, each behind <|endoftext|>."""
    pieces = []
    for text in texts:
        pieces += [END, *(cut(text, rng) if rng and IM_START not in text else [text])]
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    return torch.tensor([ident for piece in encoded for ident in piece.ids], dtype=torch.int16)


def prepare(work: Path, files: int | None) -> dict:
    """Corpus, tokenizer and ids; kept in the work folder for a resumed run."""
    if (work / "data.pt").exists():
        return torch.load(work / "data.pt", weights_only=True)
    rng = random.Random(0)
    train, held_out = read_corpus(files)
    chats = [example for text in train for example in chat_examples(text)]
    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(work / "tokenizer")
    documents = train + chats
    rng.shuffle(documents)
    data = {"train": encode(tokenizer, documents, rng), "held": encode(tokenizer, held_out)}
    data |= {"files": len(train), "train_bytes": sum(len(text.encode()) for text in train), "chats": len(chats)}
    data |= {"held_files": len(held_out), "held_bytes": sum(len(text.encode()) for text in held_out)}
    torch.save(data, work / "data.pt")
    return data


@dataclass
class Windows:
    """Endless shuffled windows over a row of tokens; every pass starts at another offset."""

    length: int
    size: int = 0
    queue: list[torch.Tensor] = field(default_factory=list)

    def take(self, size: int, count: int) -> torch.Tensor:
        """Positions [count, size] of the next windows of `size` tokens."""
        if size != self.size or len(self.queue) < count:
            starts = torch.arange(int(torch.randint(size, ())), self.length - size, size)
            self.size, self.queue = size, list(starts[torch.randperm(len(starts))])
        rows, self.queue = self.queue[:count], self.queue[count:]
        return torch.stack(rows)[:, None] + torch.arange(size)


def build(name: str) -> LlamaForCausalLM:
    shape = SHAPES[name]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    groups = shape["num_attention_heads"] // 2
    return LlamaForCausalLM(LlamaConfig(**SHARED, **shape, **ends, num_key_value_heads=groups))


def logits_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.lm_head(model.model(input_ids=ids.long(), use_cache=False).last_hidden_state).float()


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, gold: torch.Tensor, *taught: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the next token or, given the best few tokens of a teacher, with its distribution.

    The remaining probability goes to the actual next token.
    """
    scores = logits_of(model, ids).log_softmax(-1)
    came = scores.gather(-1, gold.long()[..., None]).squeeze(-1)
    if not taught:
        return -came.mean()
    top, probs = taught[0].long(), taught[1].float()
    return -((scores.gather(-1, top) * probs).sum(-1) + (1 - probs.sum(-1)) * came).mean()


@torch.no_grad()
def teach(teacher: LlamaForCausalLM, ids: torch.Tensor, minutes: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's TOP_K next tokens and their probabilities, for as many positions as time allows."""
    tops, probs, end = [], [], time.monotonic() + 60 * minutes
    for chunk in ids.split(SCORED):
        best = logits_of(teacher, chunk[None])[0].softmax(-1).topk(TOP_K)
        tops.append(best.indices.to(torch.int16))
        probs.append(best.values.half())
        print(f"\rteacher {len(tops) * SCORED / len(ids):4.0%}", end="", flush=True)
        if time.monotonic() > end:
            break
    return torch.cat(tops), torch.cat(probs)


@torch.no_grad()
def score(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss in nats per token over windows of SCORED tokens, and the greedy choice at every position."""
    total, greedy = 0.0, []
    for chunk in ids.split(SCORED):
        logits = logits_of(model, chunk[None])[0, :-1]
        total += F.cross_entropy(logits, chunk[1:].long(), reduction="sum").item()
        greedy.append(logits.argmax(-1))
    return total / sum(map(len, greedy)), torch.cat(greedy)


def rate(progress: float, step: int) -> float:
    """Fraction of the peak learning rate: warm-up, constant, then linear to zero over the last 45 % of the time."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.45)


def optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


@dataclass
class Job:
    """One model in training on `columns`: aligned rows of ids, next ids and perhaps a teacher's choices."""

    name: str
    columns: tuple[torch.Tensor, ...]
    held_out: torch.Tensor
    minutes: float
    options: argparse.Namespace
    step: int = 0
    tokens: int = 0
    spent: float = 0.0
    best: float = math.inf
    stopped: bool = False

    def __post_init__(self) -> None:
        self.model = build(self.name)
        self.steppers = optimizers(self.model, self.options.lr)
        self.path = self.options.work / f"{self.name}.pt"
        self.best_path = self.options.work / f"{self.name}-best.pt"
        if self.path.exists():
            self.restore()

    def restore(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for stepper, saved in zip(self.steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        self.step, self.tokens, self.spent, self.best = state["at"]
        torch.manual_seed(self.step)

    def save(self) -> None:
        """Measure on the held-out text; save the state, and the best weights separately."""
        loss, _ = score(self.model, self.held[: 32 * SCORED])
        print(f"\n{self.name} step {self.step} held-out {loss:.4f} ({self.spent / 60:.1f} min)", flush=True)
        if loss < self.best:
            self.best = loss
            torch.save(self.model.state_dict(), self.best_path)
        state = {"model": self.model.state_dict(), "steppers": [stepper.state_dict() for stepper in self.steppers]}
        torch.save(state | {"at": (self.step, self.tokens, self.spent, self.best)}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def one_step(self, windows: Windows, loss_fn: Callable[..., torch.Tensor]) -> float:
        progress, total = self.spent / (60 * self.minutes), 0.0
        size = [size for start, size in PHASES if progress >= start][-1]
        parts = self.options.batch // self.options.micro
        for _ in range(parts):
            positions = windows.take(size, max(1, self.options.micro // size))
            loss = loss_fn(self.model, *(column[positions] for column in self.columns)) / parts
            loss.backward()
            total += loss.item()
            self.tokens += positions.numel()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stepper in self.steppers:
            stepper.param_groups[0]["lr"] = self.options.lr * rate(progress, self.step)
            stepper.step()
            stepper.zero_grad()
        self.step += 1
        return total

    def run(self) -> Job:
        """Train until the time is spent or a signal asks to stop, then export the best weights."""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: setattr(self, "stopped", True))
        loss_fn = torch.compile(loss_of, dynamic=False) if self.options.compile else loss_of
        windows, saved, smooth = Windows(len(self.columns[1])), self.spent, 0.0
        while self.spent < 60 * self.minutes and not self.stopped:
            begun, before = time.monotonic(), self.tokens
            loss = self.one_step(windows, loss_fn)
            smooth = 0.95 * smooth + 0.05 * loss if smooth else loss
            self.spent += min(time.monotonic() - begun, 60.0)  # a pause of the whole process does not count
            self.report(smooth, (self.tokens - before) / (time.monotonic() - begun))
            if self.spent - saved > 60 * self.options.save_every:
                saved = self.spent
                self.save()
        self.save()
        self.model.load_state_dict(torch.load(self.best_path, weights_only=True))
        export(self.model, self.options.out / self.name)
        return self

    def report(self, loss: float, speed: float) -> None:
        left = self.minutes - self.spent / 60
        line = f"{self.name} step {self.step:5d}  loss {loss:.3f}  {speed:6.0f} tokens/s  {left:5.1f} min left"
        print(f"\r{line}", end="\n" if self.step % 100 == 0 else "", flush=True)


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bf16 weights and what `from_pretrained` needs beside them."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True
    ends = {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0}
    copy.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.95, **ends)
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model.config.use_cache = False


def train_model(options: argparse.Namespace, data: dict) -> Job:
    shutil.copytree(options.work / "tokenizer", options.out / "model", dirs_exist_ok=True)
    columns = data["train"][:-1], data["train"][1:]
    return Job("model", columns, data["held"], options.minutes, options).run()


def train_draft(options: argparse.Namespace, data: dict) -> Job:
    path = options.work / "teacher.pt"
    if not path.exists():
        teacher = AutoModelForCausalLM.from_pretrained(options.out / "model", dtype=torch.float32)
        torch.save(teach(teacher, data["train"], options.teach_minutes), path)
    # Where the teacher did not get to, its choices weigh nothing and the loss is the plain one.
    taught = [F.pad(part, (0, 0, 0, len(data["train"]) - len(part))) for part in torch.load(path, weights_only=True)]
    columns = data["train"][:-1], data["train"][1:], *taught
    return Job("draft", columns, data["held"], options.draft_minutes, options).run()


def measure(options: argparse.Namespace, data: dict, jobs: dict[str, Job]) -> dict:
    """The results of the exported folders, read back from disk."""
    figures = {key: value for key, value in data.items() if isinstance(value, int)}
    figures |= {"corpus_tokens": len(data["train"]), "held_tokens": len(data["held"])}
    choices = []
    for name in [name for name in SHAPES if (options.out / name / "model.safetensors").exists()]:
        model = AutoModelForCausalLM.from_pretrained(options.out / name, dtype=torch.float32)
        loss, greedy = score(model, data["held"])
        choices.append(greedy)
        bits = loss * len(data["held"]) / math.log(2) / data["held_bytes"]
        figures[name] = {"params": model.num_parameters(), "held_out_loss": loss, "perplexity": math.exp(loss)}
        figures[name] |= {"bits_per_byte": bits}
        if job := jobs.get(name):
            figures[name] |= {"train_tokens": job.tokens, "steps": job.step, "minutes": job.spent / 60}
    if len(choices) == len(SHAPES):
        figures["agreement"] = (choices[0] == choices[1]).float().mean().item()
    return figures


def parse() -> argparse.Namespace:
    first, rest = __doc__.split("\n", 1)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=style)
    home = Path(__file__).resolve().parent.parent / "penstock" / "demo"
    add = parser.add_argument
    add("--out", type=Path, default=home, help="folder that gets model/ and draft/ (default: penstock/demo)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "penstock-demo", help="checkpoints and token ids")
    add("--stage", choices=("all", "model", "draft", "measure"), default="all", help="what to do (default: all)")
    add("--minutes", type=float, default=79.0, help="training time of the main model (default: 79)")
    add("--draft-minutes", type=float, default=14.0, help="training time of the draft model (default: 14)")
    add("--teach-minutes", type=float, default=5.0, help="time to collect the main model's choices (default: 5)")
    add("--lr", type=float, default=4e-3, help="peak learning rate of both optimizers (default: 0.004)")
    add("--batch", type=int, default=12288, help="tokens per optimizer step (default: 12288)")
    add("--micro", type=int, default=4096, help="tokens per forward and backward pass (default: 4096)")
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--save-every", type=float, default=5.0, metavar="MINUTES", help="between checkpoints (default: 5)")
    add("--files", type=int, help="read only the first so many source files")
    add("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    add("--smoke", action="store_true", help="prove that everything runs: few files, seconds, a temp folder")
    return parser.parse_args()


def smoke(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="penstock-smoke-"))
    options.out, options.work, options.files, options.compile = folder / "out", folder / "work", 60, False
    options.minutes = options.draft_minutes = options.teach_minutes = 0.1


def main() -> None:
    options = parse()
    if options.smoke:
        smoke(options)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    data = prepare(options.work, options.files)
    print(f"{data['files']} files, {len(data['train']):,} tokens to train on, {len(data['held']):,} held out")
    stages = {"model": train_model, "draft": train_draft}
    jobs = {name: stage(options, data) for name, stage in stages.items() if options.stage in ("all", name)}
    print(json.dumps(measure(options, data, jobs)))


if __name__ == "__main__":
    main()
