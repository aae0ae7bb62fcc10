"""Semantic directions: what one pile of pictures has over another, as a slider to save, share and stack."""
