"""Groups of a form's fields that several tools treat alike."""

# How the experts of a stack are chosen and limited, besides their number and size
EXPERT_CHOICES = (
    "router_type",
    "norm_topk_prob",
    "routed_scaling_factor",
    "router_bias",
    "n_group",
    "topk_group",
    "router_bias_update_rate",
    "router_jitter_noise",
    "expert_capacity_factor",
    "expert_capacity",
    "expert_capacity_in_eval",
)
# What routers add to the training loss
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
# What only training reads: a model in evaluation computes the same, whatever they are
TRAINING_FIELDS = (
    "hidden_dropout",
    "attention_dropout",
    "activation_dropout",
    "classifier_dropout",
    "layerdrop",
    "label_smoothing",
    "z_loss_coef",
    *ROUTER_COEFFICIENTS,
    "router_jitter_noise",
    "router_bias_update_rate",
)
