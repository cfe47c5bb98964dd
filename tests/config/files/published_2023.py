# A config in the spelling and with the values of InternLM's published 7B file of 2023 (0.2.1, September).
JOB_NAME = "7b_train"
DO_ALERT = False
SEQ_LEN = 2048
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3
NUM_LAYER = 32
VOCAB_SIZE = 103168

model = dict(
    checkpoint=False,
    num_chunks=1,
    num_attention_heads=NUM_ATTENTION_HEAD,
    num_layers=NUM_LAYER,
    hidden_size=HIDDEN_SIZE,
    vocab_size=VOCAB_SIZE,
    mlp_ratio=MLP_RATIO,
    embed_split_hidden=True,
    embed_grad_scale=1,
    parallel_output=True,
    apply_post_layer_norm=False,
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    dtype="torch.bfloat16",
)
data = dict(
    train_folder="/path/to/dataset",
    valid_folder="/path/to/dataset",
    seq_len=SEQ_LEN,
    micro_num=4,
    micro_bsz=2,
    valid_micro_num=4,
    valid_every=50,
    total_steps=50000,
    min_length=50,
    pack_sample_into_one=False,
    skip_batches="",
    rampup_batch_size="",
    empty_cache_and_diag_interval=10,
    diag_outlier_ratio=1.1,
)
ckpt = dict(
    enable_save_ckpt=False,
    save_ckpt_folder="local:llm_ckpts",
    load_ckpt_folder="local:llm_ckpts/",
    load_ckpt_info=dict(path="local:llm_ckpts/xxxx", content=("model",), ckpt_type="internlm"),
    checkpoint_every=50,
    async_upload=True,
    async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/",
    oss_snapshot_freq=int(50 / 2),
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)
hybrid_zero_optimizer = dict(
    overlap_sync_grad=True, overlap_sync_param=True, reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0
)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)
parallel = dict(zero1=8, tensor=1, pipeline=dict(size=1, interleaved_overlap=True), sequence_parallel=False)
cudnn_deterministic = False
cudnn_benchmark = False
monitor = dict(
    alert=dict(enable_feishu_alert=DO_ALERT, feishu_alert_address=None, light_monitor_address=None),
)
