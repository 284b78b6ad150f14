"""What a training run will need, before it starts: parameters, tokens, operations, memory of a process."""
