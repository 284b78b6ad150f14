"""Recipe 'generator': caption → bits, with a frozen tokenizer."""
