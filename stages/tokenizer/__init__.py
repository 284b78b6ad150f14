"""Training and use of the tokenizer: recipe, losses with networks of their own, pictures ⇄ bits, figures."""
