"""Triton from the outside: configs as data, the ensemble's wiring, the assembled repository, the running server."""
