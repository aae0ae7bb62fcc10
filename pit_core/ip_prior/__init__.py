"""The IP-Prior: from some parts' tokens to a whole concept's tokens."""
