# InternLM2-1.8B: 16 query heads share 8 key/value heads.
model_type = "INTERNLM2_PUBLIC"
model = dict(
    num_layers=24,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_attention_heads=8,
    mlp_ratio=4,  # 8192
    vocab_size=92544,
    rope_base=1000000,
    max_position_embeddings=32768,
    dtype="torch.bfloat16",
)
