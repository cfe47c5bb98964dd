# Llama-2-70B from its Hugging Face folder, on eight nodes of 8 GPUs of 80 GB.
# Tell it where that is: ckpt.load_ckpt_info.path=... ckpt.load_ckpt_info.ckpt_type=hf
_base_ = "_base_/default_runtime.py"

JOB_NAME = "llama2_70b_train"
model_type = "LLAMA2"
model = dict(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_kv_attention_heads=8,
    intermediate_size=28672,
    vocab_size=32000,
    dtype="torch.bfloat16",
    num_chunks=2,
    checkpoint=True,
)
data = dict(seq_len=4096, micro_bsz=1, micro_num=32, total_steps=5000)
parallel = dict(
    tensor=dict(size=8, mode="msp"),  # a node computes a block: one key/value head a rank
    pipeline=dict(size=4, schedule="interleaved"),  # 80 blocks as 4 * 2 chunks of 10
    zero1=dict(size=-1),  # the 2 replicas share optimizer states
)
adam = dict(lr=1.5e-5)  # a trained model: a tenth of the peak of pre-training
lr_scheduler = dict(eta_min=1.5e-6)
ckpt = dict(checkpoint_every=250, keep_last=2)
