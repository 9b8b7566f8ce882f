"""Code that runs inside Triton's python backend; one module per model, and the parts they are made of."""
