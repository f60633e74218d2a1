"""What judges a model: metrics, what it is to beat, and tests without a step of training."""
