# Fine-tuning that two CPU cores do in two minutes: a small model learns to answer questions about this project.
# It has no base model to start from, so it learns English on the way, and answers nothing else.
JOB_NAME = "demo_sft"
run_dir = "runs/demo_sft"

model_type = "INTERNLM2_PUBLIC"
model = dict(
    num_layers=4,
    hidden_size=192,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    vocab_size=1024,  # that of the tokenizer beside the data
    max_position_embeddings=256,
    dtype="torch.float32",
)
data = dict(
    type="chat",
    train_folder="configs/demo_sft/train",  # each answer with three questions that it fits
    valid_folder="configs/demo_sft/valid",  # the same answers, asked for in other words
    tokenizer_path="configs/demo_sft/tokenizer.model",
    chat_template="chatml",
    seq_len=256,
    micro_bsz=2,  # a row of 512 tokens holds some 15 conversations
    micro_num=1,
    total_steps=200,
    valid_every=40,
    num_worker=0,
)
adam = dict(lr=3e-3, adam_beta2=0.95, weight_decay=0.1, no_decay=("*norm.weight",))
lr_scheduler = dict(warmup_ratio=0.05, eta_min=1e-4)
evaluation = dict(every=40, prompts=("What is Hybrid ZeRO?", "How do I run the tests?"))  # watch it learn
ckpt = dict(checkpoint_every=100, keep_last=1)
