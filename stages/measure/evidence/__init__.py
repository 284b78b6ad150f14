"""Studies: ways of predicting the same pictures, trained with equal numbers of operations and measured alike."""
