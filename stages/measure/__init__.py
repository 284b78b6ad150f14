"""The figures that the guides quote: how well a tokenizer reconstructs, how well a model follows its prompts."""
