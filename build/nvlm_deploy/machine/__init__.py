"""What is in this machine: its GPUs as the driver tells them, and what the host has."""
