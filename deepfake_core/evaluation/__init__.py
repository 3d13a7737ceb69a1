"""What the test split says of a trained detector.

Read `metrics` (the formulas), `evaluation` (metrics with intervals, of all images and of parts; with `bootstrap`,
`confusion` and `parts`), `test_split` (all that is measured there), `robustness` (what changes of the images cost),
`promotion` (the rule), `regression` (confirmed reports).
"""
