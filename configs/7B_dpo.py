# InternLM2-7B on pairs of answers, from a fine-tuned checkpoint, on one node of 8 GPUs of 80 GB.
#   ckpt.load_ckpt_info.path=HF_FOLDER ckpt.load_ckpt_info.ckpt_type=hf
#   data.tokenizer_path=HF_FOLDER data.train_folder=...
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm2_7B.py"]

JOB_NAME = "7b_dpo"
dpo = dict(beta=0.1)
model = dict(checkpoint=True)
data = dict(
    type="preference",
    chat_template="internlm2",
    long_samples="drop",
    seq_len=2048,
    micro_bsz=2,  # a row holds whole pairs
    micro_num=8,
    total_steps=500,
)
# The reference's weights lie beside the trained ones: both are sharded over the node.
parallel = dict(zero1=dict(size=-1), gradient=dict(size=8), weight=dict(size=8))
adam = dict(lr=5e-7, weight_decay=0.0)  # more than a millionth soon forgets what the model was
lr_scheduler = dict(warmup_ratio=0.1, eta_min=0.0)
ckpt = dict(checkpoint_every=100, keep_last=1)
