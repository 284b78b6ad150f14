"""The figures that README quotes: how well a tokenizer reconstructs, how well a model follows its prompts."""
