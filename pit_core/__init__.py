"""Piece it Together, headless: IP-Adapter tokens, the IP-Prior, and what is built on them."""

__version__ = "0.1.0"
