"""Training: data, engine, and one recipe per stage. Imports `bitdance` and `lfq_tokenizer`, never the other way round."""
