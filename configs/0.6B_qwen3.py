# Qwen3-0.6B shapes on one GPU: normed queries and keys, heads wider than hidden / heads, head tied to the embedding.
_base_ = "_base_/default_runtime.py"

JOB_NAME = "qwen3_0_6b_train"
model_type = "QWEN3"
model = dict(
    num_layers=28,
    hidden_size=1024,
    num_attention_heads=16,
    num_kv_attention_heads=8,
    intermediate_size=3072,
    vocab_size=151936,
    tie_word_embeddings=True,
    dtype="torch.bfloat16",
)
data = dict(seq_len=4096, micro_bsz=1, micro_num=8, total_steps=5000)
ckpt = dict(checkpoint_every=500, keep_last=2)
