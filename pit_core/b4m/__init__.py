"""B4M: content and style learned in separate halves of a LoRA's two factors, then joined and weighed."""
