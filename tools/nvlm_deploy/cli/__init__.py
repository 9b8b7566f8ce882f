"""The `nvlm` command: one file per verb group, no logic."""
