# InternLM2-7B on rows of 262,144 tokens, on nodes of 8 GPUs of 80 GB: `isp` of 2023, Ulysses and sharded weights.
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm2_7B.py"]

JOB_NAME = "internlm2_7b_256k"
model = dict(
    rope_base=50000000,  # as InternLM2.5-7B-Chat-1M
    max_position_embeddings=262144,
    checkpoint=True,  # 32k tokens a GPU: 8 GiB of block inputs instead of 146 GiB of all that backward needs
)
data = dict(seq_len=262144, micro_bsz=1, micro_num=1, total_steps=2000)
parallel = dict(
    # A node shares a row: 8 ranks with 4 query heads and 1 key/value head each around attention. For longer rows let
    # nodes share one as well: context=dict(ring=4).
    tensor=dict(size=8, mode="isp"),
    weight=dict(size=8, overlap=True),  # parameters and gradients over the node; the next block's travel in time
    zero1=dict(size=-1),
)
adam = dict(lr=2e-5)  # continued training of a model that knows 32k
lr_scheduler = dict(eta_min=2e-6)
ckpt = dict(checkpoint_every=100, oss_snapshot_freq=20, keep_last=3)
