"""What travels to the Hub with a checkpoint: flat files that import only torch, transformers and each other."""
