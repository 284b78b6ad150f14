"""What recipes share that train one network on the tokens of pictures, of classes or of prompts, over a frozen tokenizer."""
