"""What the test split says of a trained detector.

Read `metrics` (numbers with intervals; with `confusion`, `bootstrap` and `parts`), `test_split` (all that is measured
there), `robustness` (what changes of the images cost), `regression` (confirmed reports
judged again), `promotion` (the rule).
"""
