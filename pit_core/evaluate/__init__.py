"""The tables that the papers argue with, measured on the miniature: `pit evaluate`.

Every table has its baselines, its ceiling, the number of samples and the seed; pictures of the first rows are
kept beside it, because figures alone persuade nobody.
"""
