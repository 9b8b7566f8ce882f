"""Know before you build: memory, disk, time and latency by arithmetic, each number with its origin. No GPU."""
