"""Reports on wrong verdicts, and what people decided about them.

Read `records` (what is kept of one), then `reports` (the folder or URL that keeps them).
"""
