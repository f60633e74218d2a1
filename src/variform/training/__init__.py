"""What the scripts in finetune/ are thin over: data, tokenizers, budgets, callbacks, metrics, arguments."""
