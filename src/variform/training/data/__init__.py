"""What a model learns from: sets that are registered, local or on the Hub, and how their texts become batches."""
