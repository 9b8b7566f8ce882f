"""The steps of a build: what each reads, what it writes, and when it is up to date."""
