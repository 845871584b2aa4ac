"""The JSON bodies of the Tinker SDK's requests. Fields that nothing here uses are left out and ignored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from penstock.serving.body import Listed, RequestModel

MAX_ID = 512  # characters of an id or a path
MAX_SEQUENCE = 2**62
HOUR_S, TEN_YEARS_S = 3600, 315_360_000


def identifier() -> str:
    """A field that holds an id."""
    value: str = Field(min_length=1, max_length=MAX_ID)
    return value


class ClientConfig(RequestModel):
    """`/client/config` and `/client/dynamic_config`."""

    sdk_version: str = ""


class CreateSession(RequestModel):
    """`/create_session`."""

    user_metadata: dict[str, object] | None = None
    display_name: str | None = None


class Heartbeat(RequestModel):
    """`/session_heartbeat`."""

    session_id: str = identifier()


class Lora(RequestModel):
    """The adapter to train."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(RequestModel):
    """The optimizer, by its name."""

    type: str = "adamw"


class CreateModel(RequestModel):
    """`/create_model`."""

    session_id: str = identifier()
    model_seq_id: int = Field(ge=0, le=MAX_SEQUENCE)
    base_model: str
    lora_config: Lora | None = None
    optimizer_config: OptimizerConfig | None = None


class ModelRequest(RequestModel):
    """A request about one model in training: `/get_info`, and the base of others."""

    model_id: str = identifier()
    seq_id: int | None = Field(None, ge=0, le=MAX_SEQUENCE)


class AdamFields(RequestModel):
    """The settings of a step of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(ModelRequest):
    """`/optim_step`. `optimizer_params` are those of another optimizer."""

    adam_params: AdamFields | None = None
    optimizer_params: dict[str, object] | None = None


class SaveWeights(ModelRequest):
    """`/save_weights` and `/save_weights_for_sampler`. `path` is a name; only the latter may leave it out."""

    path: str | None = None
    ttl_seconds: int | None = Field(None, ge=HOUR_S, le=TEN_YEARS_S)
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    sampling_session_seq_id: int | None = Field(None, ge=0, le=MAX_SEQUENCE)
    kind: Literal["snapshot", "inflight"] = "snapshot"


class LoadWeights(RequestModel):
    """`/load_weights`: into a model, or (`session_id`, `model_seq_id`) into a new one."""

    model_id: str | None = Field(None, max_length=MAX_ID)
    seq_id: int | None = Field(None, ge=0, le=MAX_SEQUENCE)
    session_id: str | None = Field(None, max_length=MAX_ID)
    model_seq_id: int | None = Field(None, ge=0, le=MAX_SEQUENCE)
    base_model: str | None = None
    path: str = identifier()
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None


class CreateSamplingSession(RequestModel):
    """`/create_sampling_session`."""

    session_id: str = identifier()
    sampling_session_seq_id: int = Field(ge=0, le=MAX_SEQUENCE)
    base_model: str | None = None
    model_path: str | None = Field(None, max_length=MAX_ID)


class Chunk(RequestModel):
    """A part of a prompt; of other types than encoded text only the name is read."""

    type: str
    tokens: Listed[int] = Field(default_factory=list)


class PromptFields(RequestModel):
    """A prompt."""

    chunks: Listed[Chunk]


class SamplingFields(RequestModel):
    """The SDK's sampling parameters."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Listed[str] | Listed[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class TensorFields(RequestModel):
    """A tensor: flattened, or with the two indices the values of a sparse matrix (CSR)."""

    data: Listed[int] | Listed[float]
    dtype: str
    shape: Listed[int] | None = None
    sparse_crow_indices: Listed[int] | None = None
    sparse_col_indices: Listed[int] | None = None


class Sample(RequestModel):
    """`/asample`."""

    num_samples: int = Field(1, ge=1)
    prompt: PromptFields
    sampling_params: SamplingFields
    sampling_session_id: str = identifier()
    seq_id: int = Field(ge=0, le=2**63 - 1)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0)
    topk_sample_logprobs: int = Field(0, ge=0)
    target_prompt_logprobs: TensorFields | None = None
    prompt_alt_tokens_k: int = Field(0, ge=0)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)


class FutureRequest(RequestModel):
    """`/retrieve_future` and `/cancel_future`."""

    request_id: str = identifier()


class WeightsInfo(RequestModel):
    """`/weights_info`."""

    tinker_path: str = identifier()
