"""LoRA files: every layout in use is read, two are written, and what a file holds and fits is said."""
