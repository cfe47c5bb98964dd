# InternLM-20B on one node of 8 GPUs of 80 GB (74.5 GiB), or on two. GiB a GPU by --dry_run --world_size 8, and 16:
#   parameters, and as much for gradients    2 bytes * 20.09 G / 8        4.7 + 4.7     4.7 + 4.7
#   masters and moments                      10 bytes * 20.09 G / ranks       23.4          11.7
#   gathered blocks, activations, loss       3.0 + 20.7 + 4.4                 28.0          28.0
#   together                                                                  60.8          49.1
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm_20B.py"]

JOB_NAME = "20b_train"
model = dict(checkpoint=0.5)  # half of the blocks recomputed: activations of 20.7 GiB instead of 37.8
data = dict(seq_len=4096, micro_bsz=1, micro_num=16, total_steps=50000, min_length=50)  # 1 M tokens a step on 16
# Parameters and gradients over a node, optimizer states over all: what travels each micro batch stays on NVLink.
parallel = dict(zero1=dict(size=-1), gradient=dict(size=8), weight=dict(size=8))
ckpt = dict(checkpoint_every=500, oss_snapshot_freq=100, keep_last=3)
