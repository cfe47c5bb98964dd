# InternLM-7B (2023): 7.32 G parameters.
model_type = "INTERNLM"
model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    mlp_ratio=8 / 3,  # 11008, as Llama
    vocab_size=103168,
    dtype="torch.bfloat16",
)
