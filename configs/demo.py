# `make demo`: an INTERNLM-type model of about 10 M parameters that two CPU cores train in minutes.
# tools/demo.py makes the data folders; with other data: data.train_folder=... data.valid_folder=...
JOB_NAME = "demo"
run_dir = "runs/demo"

model_type = "INTERNLM"
model = dict(
    num_layers=8,
    hidden_size=256,
    num_attention_heads=4,
    mlp_ratio=8 / 3,  # 768
    vocab_size=6144,  # a small vocabulary: embedding and head are a third of the parameters
    max_position_embeddings=256,
    dtype="torch.float32",  # CPUs have no fast 16-bit arithmetic
)
data = dict(
    train_folder="runs/demo/data/train",
    valid_folder="runs/demo/data/valid",
    seq_len=256,
    micro_bsz=4,  # one row of 1024 tokens: with so few tokens in all, many small steps learn most
    micro_num=1,
    total_steps=240,  # some ninety seconds on two cores
    valid_every=120,
    num_worker=0,  # both cores are busy with arithmetic
)
adam = dict(lr=2e-3, adam_beta2=0.95, weight_decay=0.1, no_decay=("*norm.weight", "*bias"))
lr_scheduler = dict(warmup_ratio=0.05, eta_min=1e-4)
ckpt = dict(checkpoint_every=60, keep_last=2)
