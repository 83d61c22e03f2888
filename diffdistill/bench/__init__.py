"""What a step, a sample, a start and a checkpoint cost above what they must."""
