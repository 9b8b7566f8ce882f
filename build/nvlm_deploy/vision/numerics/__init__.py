"""The numerics gate: a vision graph beside an independent float32 reference, operation by operation."""
