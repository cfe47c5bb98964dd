# Qwen3-30B-A3B shapes on two nodes of 8 GPUs of 80 GB: 128 experts in each of 48 layers, of which a token uses 8.
# Tell it where the data are: data.train_folder=... data.valid_folder=...
_base_ = "_base_/default_runtime.py"

JOB_NAME = "30b_a3b_train"
model_type = "QWEN3_MOE"
model = dict(
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_kv_attention_heads=4,
    num_experts=128,
    moe=dict(top_k=8, intermediate_size=768),
    vocab_size=151936,
    dtype="torch.bfloat16",
    checkpoint=True,  # otherwise the rows of the experts alone, 8 for each token, take 3 GB a layer
)
data = dict(
    seq_len=4096,
    micro_bsz=4,  # long rows: each of the 128 experts sees a thousand tokens of every rank
    micro_num=4,  # 4 * 4 * 4096 tokens a GPU and step: 1 M on 16 GPUs
    total_steps=100000,
    min_length=50,
    valid_every=500,
)
# Each GPU of a node holds 16 experts of a layer, so that tokens travel inside the node. The two GPUs that hold the same
# ones share their optimizer states; those of the dense 1.5 G parameters are shared by all 16.
parallel = dict(expert=dict(size=8), zero1=dict(size=-1))
loss = dict(moe_loss_coeff=0.001)  # as Qwen3-MoE's router_aux_loss_coef
adam = dict(lr=2e-4)
ckpt = dict(checkpoint_every=1000, keep_last=3)
