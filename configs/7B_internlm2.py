# InternLM2-7B on nodes of 8 GPUs of 80 GB, 4k context.
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm2_7B.py"]

JOB_NAME = "internlm2_7b_train"
data = dict(seq_len=4096, micro_bsz=1, micro_num=4, total_steps=50000)
parallel = dict(zero1=dict(size=8))  # states over one node: the same on every node, so adding nodes adds no traffic
ckpt = dict(checkpoint_every=500, oss_snapshot_freq=100, keep_last=3)
