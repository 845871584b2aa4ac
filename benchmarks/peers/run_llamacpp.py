"""llama.cpp: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf safetensors torch==2.13.0

(This compiles llama-cpp-python, which takes some minutes.) Uses the batch interface: many sequences per call, greedy, a
shared prefix computed once. The weights are converted first, to TYPE.gguf in the same folder; Qwen3 models only.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from workloads import BORN, Limits, Work, arguments, measure, shared_tokens

BATCH, MICRO_BATCH = 2048, 512
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--type", default="bf16", choices=("bf16", "q8_0"), help="type of the weights (default: bf16)")
    args = parser.parse_args()
    begin = time.perf_counter()
    path = convert(Path(args.model), args.type)
    converting_s = time.perf_counter() - begin  # once per folder, so it is not part of loading
    measure(lambda limits: Model(path, limits).run, args, BORN + converting_s)


def convert(folder: Path, kind: str) -> Path:
    """The model in GGUF, written on first use."""
    out = folder / f"{kind}.gguf"
    if not out.exists():
        part = out.with_suffix(".part")
        write_gguf(folder, kind, part)
        part.rename(out)
    return out


def write_gguf(folder: Path, kind: str, out: Path) -> None:
    """Config and tensors; the vocabulary's texts are placeholders, because only ids are used."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3":
        raise SystemExit(f"only qwen3 models can be converted here, and {folder} is a {config['model_type']}")
    writer = gguf.GGUFWriter(out, "qwen3")
    describe(writer, config)
    quantization = gguf.GGMLQuantizationType.Q8_0 if kind == "q8_0" else gguf.GGMLQuantizationType.BF16
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            values = tensor.float().numpy()
            if values.ndim == 1:
                writer.add_tensor(gguf_name(name), values)
            else:
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes, and a vocabulary."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}".encode() for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    name = name.removeprefix("model.").removesuffix(".weight")
    if name in OUTER:
        return f"{OUTER[name]}.weight"
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.weight"


class Model:
    """A context with room for the workloads, and one batch that is refilled for every call."""

    def __init__(self, path: Path, limits: Limits) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # referenced here because the library calls it later
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.context = llama_cpp.llama_init_from_model(self.model, self.settings(limits))
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def settings(self, limits: Limits) -> Any:
        """A single cache for all sequences."""
        params = self.api.llama_context_default_params()
        params.n_ctx = limits.tokens
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = limits.requests
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = True
        return params

    def run(self, work: Work) -> list[list[int]]:
        """Prefill in full batches, then one token of every live sequence per call."""
        self.api.llama_memory_clear(self.memory, True)
        outputs: list[list[int]] = [[] for _ in work]
        newest = self.prefill(work)
        while newest:
            for number, token in newest.items():
                outputs[number].append(token)
            live = [number for number in newest if len(outputs[number]) < work[number][1]]
            newest = self.decode([(outputs[i][-1], len(work[i][0]) + len(outputs[i]) - 1, i, True) for i in live])
        return outputs

    def prefill(self, work: Work) -> dict[int, int]:
        """First tokens. The common prefix of all prompts is computed once and shared in the cache."""
        shared = shared_tokens(work)
        self.decode([(token, place, 0, False) for place, token in enumerate(work[0][0][:shared])])
        for number in range(1, len(work) if shared else 0):
            self.api.llama_memory_seq_cp(self.memory, 0, number, 0, shared)
        return self.decode(
            [
                (token, place, number, place == len(ids) - 1)
                for number, (ids, _) in enumerate(work)
                for place, token in enumerate(ids)
                if place >= shared
            ]
        )

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Run rows of (token, position, sequence, samples); the most likely next token of each row that samples."""
        tokens: dict[int, int] = {}
        for begin in range(0, len(rows), BATCH):
            tokens |= self.decode_batch(rows[begin : begin + BATCH])
        return tokens

    def decode_batch(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """One call of the library."""
        import numpy

        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, number, samples) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, samples
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, number
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        return {
            row[2]: int(
                numpy.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.vocab_size,)).argmax()
            )
            for i, row in enumerate(rows)
            if row[3]
        }


if __name__ == "__main__":
    main()
