# Usual values for pre-training a few billion parameters (those of Llama 2); norms and biases are not decayed.
adam = dict(
    lr=3e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_eps=1e-8,
    weight_decay=0.1,
    no_decay=("*norm.weight", "*bias"),
)
lr_scheduler = dict(warmup_ratio=0.01, eta_min=3e-5)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
