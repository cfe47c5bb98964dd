# InternLM-20B on 8 nodes of 8 GPUs of 80 GB.
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm_20B.py"]

JOB_NAME = "20b_train"
model = dict(checkpoint=0.5)  # half of the blocks recomputed: 43 GiB a GPU by --dry_run instead of 62
data = dict(seq_len=4096, micro_bsz=1, micro_num=4, total_steps=50000, min_length=50)
# Parameters and gradients over a node (5 + 5 GB a rank), optimizer states over all: gathers stay on NVLink.
parallel = dict(zero1=dict(size=-1), gradient=dict(size=8), weight=dict(size=8))
ckpt = dict(checkpoint_every=500, oss_snapshot_freq=100, keep_last=3)
