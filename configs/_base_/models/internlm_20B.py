# InternLM-20B (2023): deeper than its peers, 20.1 G parameters.
model_type = "INTERNLM"
model = dict(
    num_layers=60,
    hidden_size=5120,
    num_attention_heads=40,
    mlp_ratio=8 / 3,  # 13824
    vocab_size=103168,
    max_position_embeddings=4096,
    dtype="torch.bfloat16",
)
