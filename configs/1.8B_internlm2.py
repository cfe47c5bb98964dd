# InternLM2-1.8B on one node of 8 GPUs, 4k context.
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm2_1B.py"]

JOB_NAME = "internlm2_1_8b_train"
data = dict(seq_len=4096, micro_bsz=2, micro_num=4, total_steps=50000)
ckpt = dict(checkpoint_every=500, oss_snapshot_freq=100, keep_last=3)
