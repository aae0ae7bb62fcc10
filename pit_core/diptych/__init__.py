"""Diptych prompting: a subject on the left panel, a picture of it on the right. arXiv 2411.15466."""
