# InternLM-7B on one node of 8 GPUs of 80 GB. The values are those of the published 2023 file of this name.
# Tell it where the data are: data.train_folder=... data.valid_folder=...
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm_7B.py"]

JOB_NAME = "7b_train"
data = dict(
    seq_len=2048,
    micro_bsz=2,
    micro_num=4,  # 4 * 2 * 2048 tokens a GPU and step: 131k on 8 GPUs
    total_steps=50000,
    min_length=50,
    valid_every=50,
)
# 14 bytes a parameter would be 102 GB; optimizer states over the 8 ranks of a node leave 38 GB.
parallel = dict(zero1=dict(size=8))
# The published fine-tuning values, gentler than pre-training's.
adam = dict(lr=1e-4, weight_decay=0.01, no_decay=())
lr_scheduler = dict(eta_min=1e-5)
ckpt = dict(checkpoint_every=50, oss_snapshot_freq=25, keep_last=3)
