"""What people read.

`data_report` and `model_report` are pages (`pages`, `plots`). `drift_report` is what `watch` shows. `model_card` and
`outcome` are text.
"""
