"""Reports on wrong verdicts, and what people decided about them.

Read `records` (what is kept of one), `reports` (the folder or URL that keeps them), then `review` (what a person sees
and decides).
"""
