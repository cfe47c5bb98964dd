# Llama-2-7B from its Hugging Face folder, on one node of 8 GPUs of 80 GB.
# Tell it where that is: ckpt.load_ckpt_info.path=... ckpt.load_ckpt_info.ckpt_type=hf
_base_ = "_base_/default_runtime.py"

JOB_NAME = "llama2_7b_train"
model_type = "LLAMA2"
model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    intermediate_size=11008,
    vocab_size=32000,
    dtype="torch.bfloat16",
)
data = dict(seq_len=4096, micro_bsz=1, micro_num=4, total_steps=5000)
parallel = dict(zero1=dict(size=8))
adam = dict(lr=2e-5)  # a trained model: a tenth of the peak of pre-training
lr_scheduler = dict(eta_min=2e-6)
ckpt = dict(checkpoint_every=500, keep_last=2)
