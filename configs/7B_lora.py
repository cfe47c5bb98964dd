# InternLM2-7B with LoRA on conversations, on one GPU of 80 GB: 16 GB of frozen weights, 40 M trained parameters.
# Tell it what to start from and what to train on:
#   ckpt.load_ckpt_info.path=HF_FOLDER ckpt.load_ckpt_info.ckpt_type=hf
#   data.tokenizer_path=HF_FOLDER data.train_folder=...
_base_ = ["_base_/default_runtime.py", "_base_/models/internlm2_7B.py"]

JOB_NAME = "7b_lora"
lora = dict(rank=16, alpha=32)
model = dict(checkpoint=True)
data = dict(
    type="chat",
    chat_template="internlm2",
    long_samples="drop",
    seq_len=4096,
    micro_bsz=1,
    micro_num=8,
    total_steps=1000,
)
parallel = dict(zero1=dict(size=-1))
adam = dict(lr=2e-4, weight_decay=0.0)  # adapters take ten times the rate of full fine-tuning
lr_scheduler = dict(warmup_ratio=0.03, eta_min=2e-5)
ckpt = dict(checkpoint_every=200, keep_last=1)
