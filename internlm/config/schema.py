"""Every knob of a run: frozen pydantic models with type, default and meaning side by side.

The names are those of InternLM's 2023 configs wherever that framework had the knob; names that came later follow
its style. Old spellings are mapped in `legacy.py`, presets per `model_type` in `presets.py`, and problems that span
several sections are found in `checks.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from internlm.config.data_section import DataConfig
from internlm.config.output_sections import CkptConfig, MonitorConfig
from internlm.config.rope_section import RopeScaling
from internlm.config.section import Fraction, PositiveInt, Section

Dtype = Literal["torch.float32", "torch.tf32", "torch.bfloat16", "torch.float16"]
V_SCHEDULES = ("zbv", "dualpipev")  # whose chunks go down the stages of a pipeline and up again


def _value(section: Any, key: str) -> Any:
    """The value of `key` in a section, which may be a dict or already built; None if it has none."""
    return section.get(key) if isinstance(section, dict) else getattr(section, key, None)


class MoeConfig(Section):
    """Mixture of experts: what the routers of a model with `num_experts` > 1 do with a token."""

    top_k: PositiveInt = Field(2, description="experts that compute a token")
    intermediate_size: PositiveInt | None = Field(
        None, description="width of an expert; None: that of a dense feed-forward layer"
    )
    num_shared_experts: Annotated[int, Field(ge=0)] = Field(
        0, description="experts that every token uses, built as one layer of that many expert widths"
    )
    mix_shared: bool = Field(
        False, description="weigh routed and shared output by a softmax of the token, not add them (one shared expert)"
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="router scores, over all experts or for each")
    norm_topk: bool | None = Field(
        None, description="divide the weights of a token's experts by their sum; None: if top_k > 1"
    )
    router_fp32: bool = Field(True, description="router weight and logits in fp32 whatever the model's dtype")
    balance_over: Literal["all", "first"] = Field(
        "all", description="the balancing loss counts all chosen experts of a token, or its first choice only (GShard)"
    )
    bias_rate: Annotated[float, Field(ge=0)] = Field(
        0.0, description="balance without a loss: each step moves the bias of an expert's score by this much; 0: off"
    )
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="in training, an expert takes at most this many times its fair share of a row's tokens, those with "
        "the highest scores; None: dropless",
    )
    min_capacity: PositiveInt = Field(4, description="least capacity of an expert, in tokens of a row")

    @property
    def normalises(self) -> bool:
        """Whether a token's weights add up to one."""
        return self.top_k > 1 if self.norm_topk is None else self.norm_topk


class ModelConfig(Section):
    """Sizes and switches of one `Transformer`. A `model_type` preset fills what the file leaves out."""

    num_layers: PositiveInt = Field(description="transformer blocks")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    vocab_size: PositiveInt = Field(description="rows of embedding and head; every token id is below it")
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_kv_attention_heads: PositiveInt | None = Field(
        None, description="key/value heads; None: as many as query heads"
    )
    head_dim: PositiveInt | None = Field(None, description="size of one head; None: hidden_size / num_attention_heads")
    mlp_ratio: Annotated[float, Field(gt=0)] = Field(
        8 / 3, description="feed-forward width / hidden_size, rounded up to multiple_of"
    )
    multiple_of: PositiveInt = Field(256, description="rounding of the feed-forward width")
    intermediate_size: PositiveInt | None = Field(
        None, description="feed-forward width, exact; None: from mlp_ratio and multiple_of"
    )
    num_experts: PositiveInt = Field(1, description="experts of each feed-forward layer; 1: a dense layer")
    moe: MoeConfig = Field(MoeConfig(), description="mixture of experts, with num_experts > 1")
    dtype: Dtype = Field(
        "torch.bfloat16",
        description="dtype of parameters and activations; torch.float32 multiplies matrices in full precision, "
        "torch.tf32 is float32 whose matrix products on a GPU round their inputs to tf32",
    )
    max_position_embeddings: PositiveInt = Field(
        2048, description="longest text the model is made for; written into exports"
    )
    rope_base: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary angles")
    rope_scaling: RopeScaling | None = Field(None, description="rotary angles for longer texts; None: as they are")
    qk_interleaved: bool = Field(False, description="rotary pairs elements 2j and 2j+1 instead of j and j + head_dim/2")
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="epsilon of every RMSNorm")
    qkv_bias: bool = Field(False, description="bias on the query, key and value projections")
    out_bias: bool = Field(False, description="bias on the attention output projection")
    qk_norm: bool = Field(False, description="RMSNorm over head_dim on queries and keys before rotary")
    norm_head: bool = Field(False, description="each head row divided by its L2 norm")
    tie_word_embeddings: bool = Field(False, description="the head uses the embedding's weight")
    residual_in_fp32: bool = Field(False, description="keep the residual stream in fp32")
    embed_grad_scale: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="gradient of embedding output and head weight times this factor; 1: off"
    )
    num_chunks: PositiveInt = Field(
        1, description="chunks (runs of blocks) per pipeline stage; above 1: the interleaved schedule"
    )
    checkpoint: bool | Fraction | Literal["selective", "feed_forward", "offload"] = Field(
        False,
        description="what backward recomputes: False: nothing; True: all blocks; or a fraction, of the first blocks; "
        '"feed_forward": their feed-forward layers, which saves half of the memory for a sixth of the work; '
        '"offload": keep as much in host memory instead; "selective": all but matrix products and attention',
    )
    fp8: bool = Field(
        False,
        description="matrix products of the blocks in 8-bit floating point (GPUs from Hopper on): 1.4 times as fast "
        "for the 7B; for the effect on the loss see benchmarks/README.md",
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile each block; auto: on a GPU, if blocks don't communicate"
    )
    attn_backend: Literal["auto", "sdpa", "flash4", "cudnn", "varlen", "flash"] = Field(
        "auto",
        description="attention kernel; auto: the fastest that applies (internlm/ops/attention.py); a ring has its own",
    )
    init: Literal["internlm", "internlm2"] = Field("internlm2", description="whose rule for initial values")
    init_type: Literal["normal", "uniform"] = Field(
        "normal", description="distribution of the internlm2 initial values"
    )
    use_scaled_init: bool = Field(True, description="divide initial output projections by sqrt(2 (layer + 1))")
    embedding_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of the embedding (init=internlm2)")
    attn_wqkv_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of wqkv (init=internlm2)")
    attn_other_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of wo (init=internlm2)")
    ffn_uplayer_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of w1, w3 (init=internlm2)")
    ffn_other_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of w2 (init=internlm2)")
    out_head_init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="std of the head (init=internlm2)")

    @property
    def num_kv_heads(self) -> int:
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.mlp_ratio)
        return (width + self.multiple_of - 1) // self.multiple_of * self.multiple_of

    @property
    def expert_size(self) -> int:
        """Width of one expert."""
        return self.moe.intermediate_size or self.ffn_size

    @property
    def recompute_fraction(self) -> float:
        """Share of blocks that run again in backward as a whole."""
        return 0.0 if isinstance(self.checkpoint, str) else float(self.checkpoint)


class LoraConfig(Section):
    """Adapters: the model is frozen, and small matrices beside its projections are trained."""

    rank: PositiveInt = Field(8, description="inner size of an adapter")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="an adapter's output is multiplied by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of its inputs dropped in training")
    target: tuple[str, ...] = Field(
        ("*.attention.w*", "*.feed_forward.w*"), min_length=1, strict=False, description="patterns of the projections"
    )
    base: Literal["full", "nf4"] = Field(
        "full", description="frozen projections in the model's dtype, or in 4 bits (extra gpu: bitsandbytes)"
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def packed(self) -> tuple[str, ...]:
        """Patterns of the frozen parameters that are held in 4 bits."""
        return ("layers.*.w*.weight",) if self.base == "nf4" else ()


class DpoConfig(Section):
    """Preference tuning; the reference is the model of `ckpt.load_ckpt_info`."""

    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how strongly the model is held to the reference")
    reference: Literal["each_step", "once"] = Field(
        "each_step",
        description="when the reference's log-probabilities are computed: each_step: for each row that is trained on, "
        "by weights that stay in memory; once: before training, then kept beside the checkpoints; needed in a pipeline",
    )


class AdamConfig(Section):
    lr: Annotated[float, Field(ge=0)] = Field(1e-4, description="peak learning rate")
    adam_beta1: Fraction = Field(0.9, description="decay of the first moment")
    adam_beta2: Fraction = Field(0.95, description="decay of the second moment, if beta2_scheduler doesn't set it")
    adam_eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="epsilon of the update")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled weight decay")
    no_decay: tuple[str, ...] = Field(
        (), strict=False, description='patterns of parameters without weight decay, such as "*norm.weight"; 2023: none'
    )


class LRSchedulerConfig(Section):
    type: Literal["cosine", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    total_steps: PositiveInt | None = Field(None, description="length of the schedule; None: data.total_steps")
    init_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps at learning rate 0 before the warm-up")
    warmup_ratio: Fraction = Field(0.0, description="share of total_steps spent in the linear warm-up")
    decay_ratio: Fraction = Field(0.1, description="wsd: share of total_steps spent in the final linear decay")
    eta_min: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate at the end")


class Beta2SchedulerConfig(Section):
    init_beta2: Fraction | None = Field(None, description="smallest beta2; None: adam.adam_beta2")
    c: float = Field(0.0, description="c > 0: beta2 = max(init_beta2, 1 - 1 / n^c) after n updates")


class HybridZeroConfig(Section):
    """The optimizer engine; the sizes of its shards are in `parallel`."""

    overlap_sync_grad: bool = Field(True, description="reduce gradients of a unit while backward goes on")
    overlap_sync_param: bool = Field(True, description="gather updated parameters while the next forward goes on")
    clip_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="global gradient norm limit; 0: no clipping")
    master: Literal["split", "fp32"] = Field(
        "split",
        description="fp32 master of 16-bit parameters: split = bf16 parameter + 16-bit remainder (2 more bytes), "
        "fp32 = copy (4 more bytes); with float16 the default is fp32",
    )
    grad_dtype: Literal["model", "torch.float32"] = Field(
        "model", description="dtype in which gradients are accumulated and reduced"
    )
    moment_dtype: Literal["torch.float32", "torch.bfloat16"] = Field(
        "torch.float32", description="dtype of Adam's moments"
    )


class Fp16ScalerConfig(Section):
    initial_scale: Annotated[float, Field(gt=0)] = Field(2.0**16, description="loss scale at the start")
    min_scale: Annotated[float, Field(gt=0)] | None = Field(1.0, description="loss scale never falls below")
    growth_interval: PositiveInt = Field(1000, description="steps without overflow before the scale grows")


class GradScalerConfig(Section):
    """Dynamic loss scaling; used with float16 only."""

    fp16: Fp16ScalerConfig = Field(Fp16ScalerConfig(), description="start and growth")
    growth_factor: Annotated[float, Field(gt=1)] = Field(2.0, description="factor of a growth")
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="factor after overflows")
    max_scale: Annotated[float, Field(gt=0)] | None = Field(2.0**24, description="loss scale never exceeds")
    hysteresis: Annotated[int, Field(ge=0)] = Field(2, description="overflows before the scale falls")


class LossConfig(Section):
    label_smoothing: Fraction = Field(0.0, description="share of the target spread over the vocabulary")
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the squared log-sum-exp of a token's logits; 1e-4 is usual"
    )
    reduction: Literal["token", "micro_batch"] = Field(
        "token",
        description="token: divide once by all trained tokens of the step; micro_batch: mean of means, as in 2023",
    )
    moe_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        0.01, description="weight of the balancing loss of experts: mean over the step's rows, sum over layers"
    )
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the router z-loss, which keeps its logits small; counted likewise"
    )


class AxisConfig(Section):
    """The size of an axis."""

    size: int = Field(1, description="number of ranks")


class Zero1Config(AxisConfig):
    size: int = Field(-1, description="ranks that share one set of optimizer states; -1: all data ranks")


class GradientConfig(AxisConfig):
    size: int = Field(
        1, description="ranks that share one set of accumulated gradients; -1: all data ranks; left out: weight.size"
    )


class TensorConfig(AxisConfig):
    mode: Literal["mtp", "msp", "fsp", "isp"] = Field(
        "mtp", description="what tensor ranks send and keep (doc/parallelism.md); isp: Ulysses instead, as in 2023"
    )


class WeightConfig(AxisConfig):
    size: int = Field(1, description="ranks that share one set of parameters (ZeRO-3 / HSDP); -1: all data ranks")
    overlap: bool = Field(True, description="gather the next unit's parameters while one computes")


class ContextConfig(Section):
    """Ranks between which a packed row is cut; attention still sees whole documents."""

    ring: PositiveInt = Field(1, description="ranks of ring attention, between which keys and values travel")
    ulysses: PositiveInt = Field(
        1, description="ranks that exchange tokens for heads around attention; tensor.mode=isp sets it by tensor.size"
    )


class PipelineConfig(AxisConfig):
    schedule: Literal["auto", "1f1b", "interleaved", "zbv", "dualpipev"] = Field(
        "auto", description="order of micro batches; auto: interleaved when model.num_chunks > 1, else 1f1b"
    )
    split: Literal["even", "flops"] | Annotated[tuple[PositiveInt, ...], Field(strict=False)] = Field(
        "even",
        description="blocks per chunk: even as in 2023; flops counts the head as well; or the numbers themselves, in "
        "the order of the forward pass, which tools/measure_split.py finds by measuring",
    )


class ParallelConfig(Section):
    """Ranks per axis. ZeRO sizes form a divisor chain: weight | gradient | zero1 | ranks that hold the same weights."""

    zero1: Zero1Config = Field(Zero1Config(), description="shards of optimizer states")
    gradient: GradientConfig = Field(GradientConfig(), description="shards of accumulated gradients (ZeRO-2)")
    weight: WeightConfig = Field(WeightConfig(), description="shards of parameters")
    tensor: TensorConfig = Field(TensorConfig(), description="tensor parallel")
    context: ContextConfig = Field(ContextConfig(), description="sequence parallel")
    pipeline: PipelineConfig = Field(PipelineConfig(), description="pipeline parallel")
    expert: AxisConfig = Field(AxisConfig(), description="ranks over which the experts are distributed")

    @model_validator(mode="before")
    @classmethod
    def _gradient_follows_weight(cls, data: Any) -> Any:
        """Gradients are cut at least as finely as parameters, so that is their default."""
        size = _value(_value(data, "weight"), "size")
        if isinstance(data, dict) and "gradient" not in data and size is not None:
            return {**data, "gradient": {"size": size}}
        return data

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Ranks on each axis of the model but data, which takes the rest. `isp` is Ulysses under its 2023 name."""
        isp = self.tensor.mode == "isp"
        return {
            "pipeline": self.pipeline.size,
            "ring": self.context.ring,
            "ulysses": self.context.ulysses * (self.tensor.size if isp else 1),
            "tensor": 1 if isp else self.tensor.size,
        }


class EvaluationConfig(Section):
    """Prompts and tasks for the model while it trains, in addition to the validation sets of `data`."""

    every: Annotated[int, Field(ge=0)] = Field(0, description="evaluate every this many steps; 0: never")
    prompts: tuple[str, ...] = Field(
        (), strict=False, description="texts to continue; with data.type=chat or preference, a user's questions"
    )
    max_new_tokens: PositiveInt = Field(64, description="most tokens of an answer")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="of the answers; 0: the likeliest token")
    tasks: tuple[str, ...] = Field((), strict=False, description="tasks of lm-evaluation-harness (extra eval) to score")
    include_path: str | None = Field(None, description="folder with YAML files of tasks of your own")
    limit: PositiveInt | None = Field(None, description="questions of each task; None: all")


class Config(Section):
    """One run. Built by `load_config`, printed once, stored with every checkpoint, never changed."""

    JOB_NAME: str = Field("AnonymousJob", description="label of the run")
    run_dir: str | None = Field(None, description="folder of all outputs; None: runs/JOB_NAME")
    seed: int = Field(1024, description="seed of initial values")
    model_type: str = Field("INTERNLM", description="preset: one of the families in the section `model`")
    use_fp32_norm: bool = Field(False, description="keep norm weights in fp32")
    model: ModelConfig = Field(description="the transformer")
    data: DataConfig = Field(description="data and batches")
    parallel: ParallelConfig = Field(ParallelConfig(), description="ranks per axis")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the model; None: all of the model")
    dpo: DpoConfig | None = Field(None, description="train on pairs of answers (data.type=preference)")
    hybrid_zero_optimizer: HybridZeroConfig = Field(HybridZeroConfig(), description="the optimizer engine")
    adam: AdamConfig = Field(AdamConfig(), description="AdamW")
    lr_scheduler: LRSchedulerConfig = Field(LRSchedulerConfig(), description="learning rate")
    beta2_scheduler: Beta2SchedulerConfig = Field(Beta2SchedulerConfig(), description="beta2")
    grad_scaler: GradScalerConfig = Field(GradScalerConfig(), description="float16 loss scale")
    loss: LossConfig = Field(LossConfig(), description="the objective")
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(), description="evaluation by prompts and tasks while training"
    )
    ckpt: CkptConfig = Field(CkptConfig(), description="checkpoints")
    monitor: MonitorConfig = Field(MonitorConfig(), description="outputs beside console and metrics.jsonl")

    @property
    def pipeline_schedule(self) -> str:
        """The order of micro batches: 1f1b, interleaved, zbv or dualpipev."""
        if self.parallel.pipeline.schedule != "auto":
            return self.parallel.pipeline.schedule
        return "interleaved" if self.model.num_chunks > 1 else "1f1b"

    @property
    def chunks_per_stage(self) -> int:
        """Chunks (runs of blocks) of a pipeline stage; two in the V of zbv and dualpipev."""
        return 2 if self.pipeline_schedule in V_SCHEDULES else self.model.num_chunks

    @model_validator(mode="before")
    @classmethod
    def _master_follows_dtype(cls, data: Any) -> Any:
        """float16 has other exponent bits than float32, so its master cannot be split."""
        if not isinstance(data, dict) or _value(data.get("model"), "dtype") != "torch.float16":
            return data
        engine = data.get("hybrid_zero_optimizer", {})
        if isinstance(engine, dict) and "master" not in engine:
            return {**data, "hybrid_zero_optimizer": {**engine, "master": "fp32"}}
        return data
