"""What NVLM-D is: its facts, tiling, prompt and mathematics; nothing about engines."""
