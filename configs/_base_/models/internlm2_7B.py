# InternLM2-7B: 32 query heads share 8 key/value heads.
model_type = "INTERNLM2_PUBLIC"
model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    mlp_ratio=3.5,  # 14336
    vocab_size=92544,
    rope_base=1000000,
    max_position_embeddings=32768,
    dtype="torch.bfloat16",
)
