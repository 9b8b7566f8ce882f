"""How long answers take, seen from the client."""
