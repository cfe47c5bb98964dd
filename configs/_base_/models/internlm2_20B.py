# InternLM2-20B: 48 query heads share 8 key/value heads.
model_type = "INTERNLM2_PUBLIC"
model = dict(
    num_layers=48,
    hidden_size=6144,
    num_attention_heads=48,
    num_kv_attention_heads=8,
    mlp_ratio=8 / 3,  # 16384
    vocab_size=92544,
    rope_base=1000000,
    max_position_embeddings=32768,
    dtype="torch.bfloat16",
)
