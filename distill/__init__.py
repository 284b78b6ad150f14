"""16 → 64 tokens per step: a model learns to predict larger patches from one that predicts smaller ones."""
