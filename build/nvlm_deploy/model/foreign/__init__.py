"""What a checkpoint's files carry beside its weights, and what becomes of each setting."""
